"""A run's process that a template has forked: the same to its owner as one of our own children.

Layer 2. It is no child of ours, so the kernel tells us when it ends (a pidfd) and its template
how. When the template is gone, nobody knows how, and the run's own last frame has to do. Signals
go through the pidfd, which never means another process that has got the same pid.
"""

import asyncio
import contextlib
import os
import signal

REPORT_S = 5.0
"""A process that has ended is told of by its template at once. One that hangs for so long will
not tell any more."""


class ForkedProcess:
    """What `dbt_process` uses of `asyncio.subprocess.Process`, and two words of its template."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        stdin: asyncio.StreamWriter,
        stdout: asyncio.StreamReader,
        output: asyncio.BaseTransport,
    ) -> None:
        self.pid = pid
        self.stdin: asyncio.StreamWriter | None = stdin
        self.stdout: asyncio.StreamReader | None = stdout
        self.returncode: int | None = None
        """Also None after the end, when nobody knows."""
        self._pidfd = pidfd
        self._output = output
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._is_gone = False
        self._is_orphan = False
        self._limit: asyncio.TimerHandle | None = None
        self._loop.add_reader(pidfd, self._gone)

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    async def wait(self) -> int | None:
        await asyncio.shield(self._ended)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError when it has ended."""
        if self.has_ended:
            raise ProcessLookupError
        signal.pidfd_send_signal(self._pidfd, number)

    def kill_group(self) -> None:
        """SIGKILL to it and to what it started. Its template does so too, when it has ended."""
        if self.has_ended:
            return
        with contextlib.suppress(ProcessLookupError):  # also where it has no group of its own yet
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Of what we hold; after its end."""
        self._output.close()

    # From its template.

    def exited(self, code: int) -> None:
        self._settle(code)

    def orphaned(self) -> None:
        """Its template is gone. The run does not need it."""
        self._is_orphan = True
        if self._is_gone:
            self._settle(self._adopted_code())

    # From the kernel.

    def _gone(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._is_gone = True
        if self._is_orphan:
            self.kill_group()
            self._settle(self._adopted_code())
        else:
            self._limit = self._loop.call_later(REPORT_S, self._give_up)

    def _give_up(self) -> None:
        """Of its template, which hangs, and so has not seen to the rest of the group either."""
        self.kill_group()
        self._settle(None)

    def _adopted_code(self) -> int | None:
        """Orphans are handed to the first process of the container, which may be us."""
        try:
            found = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return None
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _settle(self, code: int | None) -> None:
        if self._ended.done():
            return
        if self._limit is not None:
            self._limit.cancel()
        self.returncode = code
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set_result(None)
