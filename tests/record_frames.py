"""Records what real dbt makes the child say: the data of the normalizer's unit tests.

    python -m tests.record_frames [--python INTERPRETER] [SCENARIO ...]

writes `tests/unit/frames/<dbt version>/<scenario>.jsonl`, one frame a line, without paths of
the machine. Run it with an interpreter for each dbt; a new scenario is one line in SCENARIOS.
"""

import argparse
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from dbtstream import frames
from tests import dbt_projects as projects

OUT = Path(__file__).parent / "unit" / "frames"


@dataclass(frozen=True)
class Scenario:
    files: dict[str, str]
    args: list[str]
    first: list[str] | None = None  # a run before, which is not recorded
    config: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    threads: int = 2
    during_slow: Callable[[projects.Child], None] | None = None
    since: tuple[int, int] = (1, 8)


def cancel(child: projects.Child) -> None:
    child.control(frames.CONTROL_CANCEL)


def kill(child: projects.Child) -> None:
    child.process.send_signal(signal.SIGKILL)


EVENT_TIMES = ["--event-time-start", "2024-01-01", "--event-time-end", "2024-01-04"]
FAILING_START = {"on-run-start": ["select 1", "select * from no_such_table"]}
SKIP_FLAG = {"send_anonymous_usage_stats": False, "skip_nodes_if_on_run_start_fails": True}

SCENARIOS = {
    "success": Scenario(projects.shop(), ["build"]),
    "success_info_queries": Scenario(
        projects.shop(),
        ["build"],
        start={"log_level": "info", "queries": True, "query_sql": True},
    ),
    "node_failure": Scenario(projects.node_failure(), ["build"]),
    "node_compile_error": Scenario(projects.node_compile_error(), ["build"]),
    "test_failure": Scenario(projects.test_failure(), ["build"]),
    "test_warn": Scenario(projects.test_warn(), ["build"]),
    "skip_chain": Scenario(projects.skip_chain(), ["build"]),
    "fail_fast": Scenario(projects.skip_chain(), ["build", "--fail-fast"], threads=1),
    "on_run_start_failure": Scenario(projects.shop(), ["build"], config=FAILING_START),
    "on_run_start_failure_skip": Scenario(
        projects.shop(), ["build"], config={**FAILING_START, "flags": SKIP_FLAG}, since=(1, 9)
    ),
    "on_run_end_hook": Scenario(
        projects.shop(),
        ["build"],
        config={"on-run-start": ["select 1"], "on-run-end": ["select 2", "select 3"]},
    ),
    "compile_error": Scenario(projects.compile_error(), ["build"]),
    "bad_profile": Scenario(projects.shop(), ["build"], config={"profile": "nobody"}),
    "usage_error": Scenario(projects.shop(), ["build", "--no-such-flag"]),
    "cancelled": Scenario(projects.slow(), ["build"], during_slow=cancel),
    "killed": Scenario(projects.slow(), ["build"], during_slow=kill),
    "ephemeral": Scenario(projects.ephemeral(), ["build"]),
    "seeds_snapshots": Scenario(projects.seeds_snapshots(), ["build"]),
    "unit_tests": Scenario(projects.unit_tests(), ["build"]),
    "freshness": Scenario(projects.freshness(), ["source", "freshness"], first=["run"]),
    "microbatch": Scenario(projects.microbatch(), ["build", *EVENT_TIMES], threads=1, since=(1, 9)),
    "microbatch_partial": Scenario(
        projects.microbatch(fail_on_day=2), ["build", *EVENT_TIMES], threads=1, since=(1, 9)
    ),
    "microbatch_concurrent": Scenario(
        projects.microbatch(concurrent=True), ["build", *EVENT_TIMES], threads=4, since=(1, 9)
    ),
    "exposure": Scenario(projects.exposure(), ["build"]),
    "no_nodes": Scenario(projects.shop(), ["build", "--select", "nothing_like_it"]),
    "run_operation": Scenario(
        projects.run_operation(), ["run-operation", "tidy", "--args", "{word: up}"]
    ),
    "list": Scenario(projects.shop(), ["list"]),
    "version_model": Scenario(projects.version_model(), ["build"]),
}


def record(scenario: Scenario, root: Path, python: str) -> list[frames.AnyFrame]:
    project = projects.write_project(
        root, scenario.files, threads=scenario.threads, **scenario.config
    )
    if scenario.first is not None:
        with projects.Child(project, scenario.first, python=[python]) as child:
            child.end()
    with projects.Child(project, scenario.args, python=[python], **scenario.start) as child:
        if scenario.during_slow is not None:
            child.until(frames.NodeWork, unique_id="model.shop.slow")
            scenario.during_slow(child)
        child.end()
        return child.frames


def without_paths(line: bytes, root: Path, python: str) -> bytes:
    """Nothing of this machine stays in the record."""
    venv = Path(python).parents[1]
    for path, name in ((root.resolve(), b"/project"), (root, b"/project"), (venv, b"/venv")):
        line = line.replace(str(path).encode(), name)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=projects.PYTHON)
    parser.add_argument("scenario", nargs="*")
    options = parser.parse_args()
    release = projects.dbt_release(options.python)
    for name in options.scenario or SCENARIOS:
        scenario = SCENARIOS[name]
        if release < scenario.since:
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            recorded = record(scenario, root, options.python)
            hello = recorded[0]
            if not isinstance(hello, frames.Hello):
                raise SystemExit(f"{name}: {hello}")
            out = OUT / hello.dbt_version / f"{name}.jsonl"
            out.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                without_paths(msgspec.json.encode(frame), root, options.python)
                for frame in recorded
            ]
            out.write_bytes(b"\n".join(lines) + b"\n")
            print(f"{name}: {len(lines)} frames, ends with {type(recorded[-1]).__name__}")


if __name__ == "__main__":
    main()
