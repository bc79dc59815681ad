"""An interpreter with a dbt that is imported in no time: for tests of what is around it.

`fake_dbt(folder)` lays out dbt-core 1.11.0 and an adapter called `fake` with their metadata; a
run's args are `["code", <Python>]`, run where dbt would be. It is a virtual environment with
nothing else in it.
"""

import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAIN = """
class dbtRunnerResult:
    def __init__(self, success, exception=None, result=None):
        self.success, self.exception, self.result = success, exception, result

class dbtRunner:
    def __init__(self, callbacks=()):
        self.callbacks = callbacks

    def invoke(self, args, **keywords):
        try:
            exec(compile(args[1], "<run>", "exec"), {})
        except BaseException as error:
            return dbtRunnerResult(False, error)
        return dbtRunnerResult(True)
"""

FACTS = """
import json, os, signal, sys
fds = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
       if os.path.exists(f"/proc/self/fd/{fd}")}
facts = dict(pid=os.getpid(), session=os.getsid(0), group=os.getpgrp(), ppid=os.getppid(),
    environ=dict(os.environ), argv=sys.argv, path=sys.path, fds=fds, folder=os.getcwd(),
    inheritable=[fd for fd in map(int, fds) if fd > 2 and os.get_inheritable(fd)],
    gc=__import__("gc").isenabled(), shell=os.popen("env -0").read().split("\\0"))
with open(os.environ["FACTS"], "w") as file:
    json.dump(facts, file)
"""
"""Code of a run that writes down what it finds."""


@dataclass(frozen=True)
class FakeDbt:
    python: str
    folder: Path

    @property
    def record(self) -> Path:
        return self.folder / "dbt_core-1.11.0.dist-info" / "RECORD"

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")


def fake_dbt(folder: Path, *, adapter: str = "") -> FakeDbt:
    """`adapter` is the code of its module."""
    real = Path(sys.executable).resolve()
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    fake = FakeDbt(str(folder / "bin" / "python"), packages / "site-packages")
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(real)
    (folder / "pyvenv.cfg").write_text(f"home = {real.parent}\n", encoding="utf-8")
    for distribution, version in (("dbt-core", "1.11.0"), ("dbt-fake", "1.0")):
        info = f"{distribution.replace('-', '_')}-{version}.dist-info"
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        fake.write(f"{info}/METADATA", text)
        fake.write(f"{info}/RECORD", "")
    for module in ("dbt", "dbt/cli", "dbt/task", "dbt/adapters"):
        fake.write(f"{module}/__init__.py", "")
    fake.write("dbt/cli/main.py", MAIN)
    fake.write("dbt/compilation.py", "class Linker:\n    def find_cycles(self): pass\n")
    fake.write("dbt/adapters/fake/__init__.py", adapter)
    return fake


def surroundings(folder: Path, **more: str) -> Mapping[str, str]:
    """Of a run of it."""
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/nowhere",
        "FACTS": str(folder / "facts.json"),
        **more,
    }
