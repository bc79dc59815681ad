"""What dbt's processes themselves leave behind: when each began, and that no two overlapped.

A `sitecustomize` on the PYTHONPATH of a project's dbt takes an exclusive lock on a file per
project and target just before dbt is imported, and keeps it for as long as the process lives;
the kernel gives it back at the end, SIGKILL or not. Who finds it taken writes down who has it:
that is an overlap. Nothing of ours, and nothing of dbt, can be wrong about it.
"""

import asyncio
import fcntl
import json
from pathlib import Path
from typing import Any

POLL_S = 0.01

# An import of dbt, not the process's begin: before it, a process is at no target, and one that
# was started too late (its daemon was frozen in between) ends itself before.
SITECUSTOMIZE = """
import fcntl, json, os, sys, time

FOLDER = os.path.dirname(os.path.abspath(__file__))

def note(file, **facts):
    fd = os.open(os.path.join(FOLDER, file), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, json.dumps(facts).encode() + b"\\n")
    os.close(fd)

def take():
    project, target = os.environ["DBT_LOG_PATH"].split("/runs/", 1)[1].split("/")[:2]
    path = os.path.join(FOLDER, f"{project}.{target}.lock")
    me = {
        "project": project,
        "target": target,
        "pid": os.getpid(),
        "run_id": os.environ["DBT_ENV_CUSTOM_ENV_DBTSTREAM_RUN_ID"],
        "attempt": int(os.environ["DBT_ENV_CUSTOM_ENV_DBTSTREAM_ATTEMPT"]),
        "at": time.time(),
    }
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # open for as long as we live
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note("overlaps", **me, holder=os.read(lock, 4096).decode())
    else:
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps(me).encode())
    note("begun", **me)

class BeforeDbt:
    def find_spec(self, name, path=None, target=None):
        if name == "dbt":
            sys.meta_path.remove(self)
            take()
        return None

if "--fd" in sys.orig_argv:
    sys.meta_path.insert(0, BeforeDbt())
"""


class Recorder:
    """`folder` goes on the PYTHONPATH of each project's dbt."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
        self.folder = folder

    @property
    def begun(self) -> list[dict[str, Any]]:
        """Each dbt process: project, target, pid, run_id, attempt, at."""
        return self._read("begun")

    @property
    def overlaps(self) -> list[dict[str, Any]]:
        """Those that found another one at their target, and which one (`holder`)."""
        return self._read("overlaps")

    def is_free(self, project: str, target: str) -> bool:
        """Whether no dbt is at that target now."""
        path = self.folder / f"{project}.{target}.lock"
        if not path.exists():
            return True
        with path.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    async def until_free(self, project: str, target: str) -> None:
        while not self.is_free(project, target):  # noqa: ASYNC110  # the kernel tells nobody
            await asyncio.sleep(POLL_S)

    async def until_begun(self, run_id: str, attempt: int = 1) -> None:
        while not any(  # noqa: ASYNC110  # a file tells nobody
            (each["run_id"], each["attempt"]) == (run_id, attempt) for each in self.begun
        ):
            await asyncio.sleep(POLL_S)

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
