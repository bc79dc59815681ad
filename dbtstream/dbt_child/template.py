"""A process that has imported dbt, and that runs are forked from: `python dbt_child --template N`.

Besides runs, an import template forks parsers of projects (`parse`) and manifest templates, which
are the same as itself but have the parsed project as well (`manifest`); both know what they are
about from their own control pipe. Runs are forked from those in the same way.

N is a socket to the daemon (SOCK_SEQPACKET, a JSON object a message). It gets three descriptors
for each run (control, frames, output), forks, and tells the fork's pid, with a descriptor of the
process, and later how it ended. What a run is about, its environment with the secrets in it,
goes through the run's own control pipe: the template never has it, so no other run can find it.

A fork is safe only where there is one thread and nothing is open, so both are looked at before
each; where that is not so, or something else has been installed since, the run is left to start
cold. The template invokes nothing and never opens a connection. It dies with the daemon, whose
runs then find the end of their control pipe; runs that it has begun do not need it any more.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Set, Tuple

from . import fingerprint, imports
from . import main as story
from .control import die_with_parent
from .engine import Refusal
from .manifest import Parsed
from .parse import parse_project
from .scrub import Scrubber, secret_values

MAX_MESSAGE_BYTES = 64 * 1024
RUN_FDS = 3
GROWTH_BYTES = 64 * 1024 * 1024
"""With so much more memory than after its imports, a template is to be replaced."""

PARSER_NICE = 10
"""Runs that are under way are worth more than one that may come."""

LENGTH = struct.Struct(">I")
"""In front of what a run is about: its folder and its environment, between NUL bytes."""

_PIDFD_OPEN = 434  # on every architecture; os.pidfd_open is there from Python 3.9 on


def main(argv: List[str]) -> NoReturn:
    code = story.EXIT_BROKEN
    try:
        fd, max_runs = int(argv[1]), int(argv[2])
        os.set_inheritable(fd, False)
        _close_all_but({0, 1, 2, fd})
        # A Ctrl-C is not for us, and SIGTERM ends us without any word of Python's.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with_parent()
        with socket.socket(fileno=fd) as channel:
            Template(channel, max_runs).serve()
        code = 0
    except BaseException:
        traceback.print_exc()
    story.leave(code)


class Template:
    """`serve` until the daemon closes its end and all forks have ended."""

    def __init__(
        self, channel: socket.socket, max_runs: int, parsed: Optional[Parsed] = None
    ) -> None:
        self._channel = channel
        self._max_runs = max_runs
        self._parsed = parsed
        self._runs = 0
        self._forks: Dict[int, int] = {}  # pidfd -> pid
        self._accepts = True
        self._poll = select.poll()
        self._installed: fingerprint.Fingerprint = ()
        self._loose: List[str] = []
        self._loose_were: fingerprint.Fingerprint = ()
        self._rss_bytes = 0

    def serve(self) -> None:
        try:
            self._prepare()
        except Refusal as refusal:
            self._tell("refused", reason=refusal.code, detail=refusal.message)
            return
        self._serve()

    def _serve(self) -> None:
        self._poll.register(self._channel, select.POLLIN)
        while self._accepts or self._forks:
            for fd, _ in self._poll.poll():
                if fd == self._channel.fileno():
                    self._take()
                else:
                    self._see_out(fd)

    # Before the first run.

    def _prepare(self) -> None:
        """Import everything, and see that a fork of it would be safe. Raises Refusal."""
        self._installed = fingerprint.of_installed()
        reads = imports.import_all()
        _start_resource_tracker()
        os.close(_pidfd(os.getpid()))
        self._settle()
        self._check()
        self._tell("ready", reads=reads, adapters=imports.imported_adapters())

    def _settle(self) -> None:
        """What is there now is there to stay: the collector need not touch, and so copy, it."""
        self._loose = fingerprint.loose_modules()
        self._loose_were = fingerprint.of_files(self._loose)
        gc.collect()
        gc.freeze()
        gc.disable()
        self._rss_bytes = _rss_bytes()

    def _check(self, of_run: Sequence[int] = ()) -> None:
        """Raises Refusal if a fork would not be what a process of its own is."""
        threads = len(os.listdir("/proc/self/task"))  # the kernel's count: native ones, too
        if threads > 1:
            raise Refusal("threads", f"{threads} threads run after dbt's imports")
        opened = self._unknown_files(of_run)
        if opened:
            raise Refusal("open_files", f"open after dbt's imports: {', '.join(opened)}")
        if (
            fingerprint.of_installed() != self._installed
            or fingerprint.of_files(self._loose) != self._loose_were
        ):
            raise Refusal("stale", "other packages are installed than when dbt was imported")
        changed = self._parsed.change() if self._parsed is not None else None
        if changed is not None:
            raise Refusal("project_changed", changed)

    def _unknown_files(self, of_run: Sequence[int]) -> List[str]:
        known = {0, 1, 2, self._channel.fileno(), _resource_tracker_fd(), *self._forks, *of_run}
        unknown = []
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except OSError:  # the one that lists them
                continue
            if int(name) not in known and not target.startswith("/dev/"):
                unknown.append(target)
        return sorted(unknown)

    # The daemon's wishes.

    def _take(self) -> None:
        message, fds = self._receive()
        if message is None:
            self._retire()
        elif message["t"] == "fork":
            self._fork(message["id"], message.get("as", "run"), fds)
        elif message["t"] == "check":
            self._look()
        elif message["t"] == "import":
            self._import(message["adapter"])

    def _receive(self) -> Tuple[Optional[Dict[str, Any]], List[int]]:
        """None: the daemon wants no more runs."""
        fds = array.array("i")
        size = socket.CMSG_SPACE(RUN_FDS * fds.itemsize)
        data, ancillary, _, _ = self._channel.recvmsg(
            MAX_MESSAGE_BYTES, size, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        return (json.loads(data.decode("utf-8")) if data else None), list(fds)

    def _tell(self, what: str, fds: Tuple[int, ...] = (), **facts: Any) -> None:
        data = json.dumps({"t": what, **facts}).encode("utf-8")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._channel.sendmsg([data], rights)

    def _retire(self) -> None:
        if self._accepts:
            self._accepts = False
            self._poll.unregister(self._channel)

    def _import(self, adapter: str) -> None:
        """One that runs turned out to use: the next ones need not import it."""
        try:
            reads = imports.import_adapter(adapter)
            self._settle()
            self._check()
        except Refusal as refusal:
            self._tell("refused", reason=refusal.code, detail=refusal.message)
            self._retire()
        else:
            self._tell("ready", reads=reads, adapters=imports.imported_adapters())

    def _look(self) -> None:
        """Somebody has seen a file change; it may be none of ours."""
        try:
            self._check()
        except Refusal as refusal:
            self._tell("refused", reason=refusal.code, detail=refusal.message)
            self._retire()

    # Runs.

    def _fork(self, number: int, role: str, fds: List[int]) -> None:
        try:
            self._check(fds)
            pid = self._fork_as(role, fds)
        except Refusal as refusal:
            self._tell("cold", id=number, reason=refusal.code, detail=refusal.message, last=True)
            self._retire()
            return
        except OSError as error:  # too many processes, no memory
            self._tell("cold", id=number, reason="fork_failed", detail=str(error), last=False)
            return
        finally:
            for fd in fds:
                os.close(fd)
        self._runs += 1
        pidfd = _pidfd(pid)
        self._forks[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)
        self._tell("forked", (pidfd,), id=number, pid=pid, last=self._enough())
        if self._enough():
            self._retire()

    def _fork_as(self, role: str, fds: List[int]) -> int:
        become = {
            "run": self._become_run,
            "parser": self._become_parser,
            "template": self._become_template,
        }[role]
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            try:
                become(*fds)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(story.EXIT_BROKEN)
        return pid

    def _enough(self) -> Optional[str]:
        """Why this template is to be replaced, if it is."""
        if self._runs >= self._max_runs:
            return "runs"
        return "memory" if _rss_bytes() > self._rss_bytes + GROWTH_BYTES else None

    def _see_out(self, pidfd: int) -> None:
        """A run has ended. What is left of its group ends with it, while its pid is still its
        own; then the kernel may forget it, and the daemon is told."""
        pid = self._forks.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        with contextlib.suppress(OSError):  # it died before it had a group of its own
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        try:
            self._tell("exited", pid=pid, code=code)
        except OSError:  # the daemon is gone, and so are we as soon as all have ended
            self._retire()

    # In the fork.

    def _become_run(self, control: int, frames: int, output: int) -> NoReturn:
        """From here on nothing tells this process from one that was started for the run."""
        self._begin_anew(control, output)
        os.set_blocking(frames, True)
        start = "warm" if self._parsed is None else "manifest"
        story.invoke_dbt(lambda: story.Child(frames, start, self._parsed))

    def _become_parser(self, control: int, told: int, output: int) -> NoReturn:
        """A line of what is to be parsed; an answer on `told`."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._begin_anew(control, output)
        die_with_parent()
        os.nice(PARSER_NICE)
        answer: Dict[str, Any] = {"reason": "", "detail": ""}
        try:
            wish = _read_line(0)
            parse_project(wish["folder"], wish["args"], wish["unset"])
        except Refusal as refusal:
            scrubber = Scrubber(secret_values(os.environ, wish["secrets"]))
            answer = {"reason": refusal.code, "detail": scrubber.text(refusal.message)[0]}
        with os.fdopen(told, "w", encoding="utf-8") as file:
            json.dump(answer, file)
        story.leave(0)

    def _become_template(self, control: int, channel: int, output: int) -> NoReturn:
        """With a project that a parser has put away; the environment stays that of imports."""
        self._detach(control, output)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with_parent()
        os.set_inheritable(channel, False)
        with socket.socket(fileno=channel) as ours:
            wish = _read_line(0)
            _close_input()
            heir = Template(ours, wish["max_runs"])
            heir.inherit(self, wish["folder"])
        story.leave(0)

    def inherit(self, parent: Template, folder: str) -> None:
        """`serve` for a manifest template: what is imported is its parent's."""
        self._installed = parent._installed
        try:
            try:
                self._parsed = Parsed.load(folder)
                self._parsed.compile_macros()
            except Exception as error:
                raise Refusal("not_loaded", f"{type(error).__name__}: {error}") from error
            self._settle()
            self._check()
        except Refusal as refusal:
            self._tell("refused", reason=refusal.code, detail=refusal.message)
            return
        self._tell("ready", reads=[], adapters=imports.imported_adapters())
        self._serve()

    def _begin_anew(self, control: int, output: int) -> None:
        """A process that is started has this environment, this folder, and these files."""
        self._detach(control, output)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # all else is as Python left it
        folder, environment = _read_surroundings(0)
        coerced = os.environ.get("LC_CTYPE")
        os.environ.clear()
        os.environ.update(environment)
        if coerced is not None:  # by Python at its start, where it found the C locale (PEP 538)
            os.environ.setdefault("LC_CTYPE", coerced)
        time.tzset()
        os.chdir(folder)
        gc.enable()
        _forget_metadata()

    def _detach(self, control: int, output: int) -> None:
        """A session of its own, and nothing left open of the template."""
        os.setsid()
        self._channel.close()
        for pidfd in self._forks:
            os.close(pidfd)
        for fd, place in ((control, 0), (output, 1), (output, 2)):
            os.dup2(fd, place)
        os.close(control)
        os.close(output)


def _close_all_but(kept: Set[int]) -> None:
    """What the daemon, or its event loop, has left open at our start is not for any run."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that lists them
                os.close(int(name))


def _read_surroundings(fd: int) -> Tuple[str, Dict[str, str]]:
    """The run's folder and its environment. Raises EOFError if the daemon has given it up."""
    (length,) = LENGTH.unpack(_read_exactly(fd, LENGTH.size))
    folder, *pairs = _read_exactly(fd, length).split(b"\0")
    split = (pair.partition(b"=") for pair in pairs)
    return os.fsdecode(folder), {os.fsdecode(name): os.fsdecode(value) for name, _, value in split}


def _read_line(fd: int) -> Dict[str, Any]:
    """Raises EOFError if the daemon has given it up."""
    line = b""
    while not line.endswith(b"\n"):
        line += _read_exactly(fd, 1)
    wish: Dict[str, Any] = json.loads(line.decode("utf-8"))
    return wish


def _close_input() -> None:
    """The daemon's end of the control pipe has said all."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _read_exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(fd, count - len(data))
        if not part:
            raise EOFError("the daemon has given up this run")
        data += part
    return data


def _forget_metadata() -> None:
    """dbt keeps DBT_ENV_CUSTOM_ENV_* as it first found them."""
    functions = sys.modules.get("dbt_common.events.functions")
    reset = getattr(functions, "reset_metadata_vars", None)
    if reset is not None:
        reset()


def _start_resource_tracker() -> None:
    """Else each run starts one of its own, for the names of its locks."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()


def _resource_tracker_fd() -> int:
    tracker: Any = sys.modules["multiprocessing.resource_tracker"]
    fd = tracker._resource_tracker._fd  # noqa: SLF001
    return -1 if fd is None else int(fd)


def _pidfd(pid: int) -> int:
    """Raises Refusal where the kernel has no such thing (Linux before 5.3)."""
    try:
        if hasattr(os, "pidfd_open"):
            return os.pidfd_open(pid)
        fd = int(ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_OPEN, pid, 0))
    except (OSError, AttributeError) as error:
        raise Refusal("no_pidfd", f"pidfd_open: {error}") from error
    if fd < 0:
        raise Refusal("no_pidfd", f"pidfd_open: {os.strerror(ctypes.get_errno())}")
    return fd


def _rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
