"""Scripted dbt of some milliseconds, many of it, which write down themselves when they were there.

A child takes an exclusive lock on a file per project and target for as long as its process
lives; the kernel gives it back, SIGKILL or not. One that finds it taken says so: an overlap.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.daemons import project_folder
from tests.scripted_child import scripted_child

NODE_COUNT = 2

BODY = """
    import fcntl

    folder = %r
    start = start_line()
    words = start["args"]
    where = f"{os.path.basename(start['project_dir'])}.{words[words.index('--target') + 1]}"
    number = words[words.index("--select") + 1]

    def note(edge):
        fd = os.open(f"{folder}/lines", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{edge} {where} {number} {parent}\\n".encode())
        os.close(fd)

    lock = os.open(f"{folder}/{where}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note("overlap")
    note("begin")
    done = {r["unique_id"].split(".")[-1] for r in (start.get("retry") or {}).get("results", [])
            if r["status"] == "success"}
    names = {"orders": [], "customers": ["orders"]}
    todo = [name for name in names if name not in done]
    hello()
    plan(*[model(name, *names[name]) for name in todo])
    for name in todo:
        started(name)
        time.sleep(0.05)
        finished(name)
    result(0, [(name, "success") for name in todo])
    note("end")
"""


@dataclass(frozen=True)
class Line:
    edge: str  # begin, end or overlap
    where: str  # <project>.<target>
    number: int  # of the request
    worker: int  # its pid


class Children:
    """`table(project)` for a worker's config; `lines` is what they wrote, in order."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._python = scripted_child(folder / "child", BODY % str(folder))

    def table(self, project: str, targets: list[str]) -> dict[str, Any]:
        path = project_folder(self._folder, project)
        return {"path": str(path), "targets": targets, "python": self._python}

    @property
    def lines(self) -> list[Line]:
        path = self._folder / "lines"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found = (line.split() for line in text.splitlines())
        return [Line(edge, where, int(number), int(pid)) for edge, where, number, pid in found]

    @property
    def overlaps(self) -> list[Line]:
        return [line for line in self.lines if line.edge == "overlap"]

    def order(self) -> dict[str, list[int]]:
        """By target: the requests, as their first children came."""
        order: dict[str, list[int]] = {}
        for line in self.lines:
            numbers = order.setdefault(line.where, [])
            if line.edge == "begin" and line.number not in numbers:
                numbers.append(line.number)
        return order

    def now(self, worker: int) -> int:
        """How many of a worker's children are at work."""
        return self._counts(worker)[-1]

    def most_at_once(self, worker: int) -> int:
        return max(self._counts(worker))

    def _counts(self, worker: int) -> list[int]:
        """As they began and ended. Those that were killed with their worker count for ever."""
        counts = [0]
        for line in self.lines:
            if line.worker == worker and line.edge != "overlap":
                counts.append(counts[-1] + (1 if line.edge == "begin" else -1))
        return counts
