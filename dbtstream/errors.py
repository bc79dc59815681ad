"""Every error that crosses a module border, and what each branch means to its catcher.

DbtstreamError
├── ConfigError            a person must mend the config            -> exit 78, never retried
├── RequestRejected        this request cannot run                  -> run.rejected, DBT_DEAD, ack
├── ChildError             the run ends with status `error`         -> run.finished, ack
│   ├── ChildNotStarted    the interpreter is missing or refused
│   ├── HandshakeTimeout   no hello frame in time
│   ├── EngineRefused      no dbt, or a dbt that we cannot run
│   └── ChildCrashed       the pipe ended before a result, or spoke nonsense
│       ├── FrameCorrupt
│       └── FrameTooLarge
├── NatsError              the broker's side; retried where the operation is idempotent
│   ├── NatsUnavailable    no connection, or no answer in time
│   │   └── NobodyListens  the subject has no responder now         (nats_errors)
│   └── NatsRefused        the server said no (permissions, limits): retrying will not help
│       ├── JetStreamRefused   with JetStream's error code          (nats_errors)
│       └── RevisionConflict   a KV key has moved on                (kv_bucket)
├── LeaseLost              another worker may have the run: end dbt now, publish no verdict
├── Superseded             another worker has the run: stop, publish and settle nothing
├── IllegalMove            a bug: a run was moved to a state that cannot follow
└── RunNotFound            nothing is known of that run

An error takes facts and makes its own sentence; the facts stay readable as attributes.
"""

from collections.abc import Sequence


class DbtstreamError(Exception):
    """Base. `str()` says what happened, where, and where possible what to do."""


class ConfigError(DbtstreamError):
    """The configuration cannot be used."""

    def __init__(self, source: str, key: str, problem: str, hint: str = "") -> None:
        self.source, self.key, self.problem, self.hint = source, key, problem, hint
        where = f"{source}: {key}" if key else source
        super().__init__(f"{where}: {problem}" + (f" ({hint})" if hint else ""))


class RequestRejected(DbtstreamError):
    """A run request that cannot run. `code` is one of `messages.RejectCode`."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        self.code, self.message, self.field = code, message, field
        super().__init__(f"{code}: {message}")


class ChildError(DbtstreamError):
    """dbt's process did not do its part."""


class ChildNotStarted(ChildError):
    def __init__(self, python: str, problem: str) -> None:
        self.python, self.problem = python, problem
        super().__init__(
            f"cannot start the project's interpreter {python}: {problem} "
            "(set `python` of the project to an interpreter that has dbt)"
        )


class HandshakeTimeout(ChildError):
    def __init__(self, timeout_s: float, stderr_tail: str) -> None:
        self.timeout_s, self.stderr_tail = timeout_s, stderr_tail
        super().__init__(
            f"dbt's process said nothing for {timeout_s:g} s after its start"
            + (f"; its stderr ends: {stderr_tail[-500:]}" if stderr_tail else "")
        )


class EngineRefused(ChildError):
    """The child looked at the installed dbt and declined."""

    def __init__(self, code: str, message: str, engine: str | None) -> None:
        self.code, self.engine = code, engine
        super().__init__(message)


class ChildCrashed(ChildError):
    """The frame pipe ended without a result, or carried something that is not a frame."""

    def __init__(self, how: str, *, exit_code: int | None = None, stderr_tail: str = "") -> None:
        self.how, self.exit_code, self.stderr_tail = how, exit_code, stderr_tail
        parts = [f"dbt's process {how}"]
        if exit_code is not None:
            parts.append(f"(exit code {exit_code})" if exit_code >= 0 else f"(signal {-exit_code})")
        if stderr_tail:
            parts.append(f"; its stderr ends: {stderr_tail[-500:]}")
        super().__init__(" ".join(parts))


class FrameCorrupt(ChildCrashed):
    def __init__(self, problem: str, head: bytes) -> None:
        super().__init__(f"sent something that is not a frame: {problem}: {head!r}")


class FrameTooLarge(ChildCrashed):
    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"announced a frame of {length} bytes; the limit is {limit}")


class NatsError(DbtstreamError):
    """Something between us and the NATS server."""


class NatsUnavailable(NatsError):
    def __init__(self, servers: Sequence[str], problem: str) -> None:
        self.servers, self.problem = tuple(servers), problem
        super().__init__(f"no answer from NATS at {', '.join(servers)}: {problem}")


class NatsRefused(NatsError):
    def __init__(self, operation: str, problem: str, hint: str = "") -> None:
        self.operation, self.problem = operation, problem
        super().__init__(f"NATS refused {operation}: {problem}" + (f" ({hint})" if hint else ""))


class LeaseLost(DbtstreamError):
    """A lease that we held is somebody else's. `holder` is None if nobody has it any more."""

    def __init__(self, key: str, holder: str | None) -> None:
        self.key, self.holder = key, holder
        super().__init__(
            f"the lease {key} was lost: "
            + (f"worker {holder} has it" if holder else "another had it and gave it up")
        )


class Superseded(DbtstreamError):
    """A lease of ours was over without our knowing, and another one has followed it."""

    def __init__(self, run_id: str, fence: int, how: object) -> None:
        self.run_id, self.fence = run_id, fence
        super().__init__(f"run {run_id} is no longer ours under fence {fence}: {how}")


class IllegalMove(DbtstreamError):
    def __init__(self, run_id: str, current: str, wanted: str) -> None:
        self.run_id, self.current, self.wanted = run_id, current, wanted
        super().__init__(f"run {run_id} cannot go from {current} to {wanted}")


class RunNotFound(DbtstreamError):
    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        super().__init__(f"no run {run_id} is known (`dbtstream ps --all` lists those that are)")
