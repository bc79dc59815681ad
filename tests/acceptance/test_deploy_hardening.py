"""A real dbt build under the lines of the unit file that could break it.

The root is read-only but for the state directory, no capability is left, no memory is writable
and executable at once, and the system calls are those that the unit names: what the daemon,
Python, dbt and DuckDB need is among them. The same holds for the containers, whose root is
read-only, too.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.events import RunFinished
from dbtstream.local_run import copy_demo
from dbtstream.statuses import RunStatus
from tests import confined
from tests.acceptance import conftest
from tests.acceptance.conftest import serve, whole_run, write_config
from tests.deploy import DEPLOY

UNIT = DEPLOY / "systemd" / "dbtstream.service"

pytestmark = pytest.mark.skipif(
    not confined.can_confine(), reason="needs root, systemd's tools and Linux 6.3"
)

# Each of them goes well without the unit: as root, on a file system that can be written to.
ATTEMPTS = """
import json, mmap, os, sys
def tried(what):
    try:
        what()
    except OSError as error:
        return error.errno
print(json.dumps({
    "write beside": tried(lambda: open(sys.argv[1] + "/beside", "w").close()),
    "write in state": tried(lambda: open(sys.argv[1] + "/state/file", "w").close()),
    "executable memory": tried(lambda: mmap.mmap(-1, 4096, prot=7)),
    "chroot": tried(lambda: os.chroot("/")),
    "priority": tried(lambda: os.setpriority(os.PRIO_PROCESS, 0, 1)),
    "mode": oct(os.stat(sys.argv[1] + "/state/file").st_mode & 0o777),
    "capabilities": [line.split()[1] for line in open("/proc/self/status") if "CapEff" in line],
}))
"""


def under_the_unit(*writable: Path) -> tuple[str, ...]:
    """The beginning of a command."""
    options = [word for folder in writable for word in ("--write", str(folder))]
    return (sys.executable, confined.__file__ or "", str(UNIT), *options, "--")


def test_the_lines_are_in_force(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    command = (*under_the_unit(state), sys.executable, "-c", ATTEMPTS, str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "write beside": errno.EROFS,
        "write in state": None,
        "executable memory": errno.EACCES,
        "chroot": errno.EPERM,
        "priority": errno.EPERM,
        "mode": "0o600",
        "capabilities": ["0000000000000000"],
    }


async def test_dbt_builds_under_them(
    tmp_path: Path, nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, state = tmp_path / "project", tmp_path / "state"
    copy_demo(project)
    (state / "tmp").mkdir(parents=True)
    before = {path.relative_to(project) for path in project.rglob("*")}
    config = write_config(
        tmp_path,
        nats_server.url,
        project,
        profiles_dir=f'"{project}"',
        env=f'{{ DBTSTREAM_DEMO_DB = "{state}/flights.duckdb" }}',
    )
    monkeypatch.setattr(conftest, "COMMAND", (*under_the_unit(state), *conftest.COMMAND))
    # As the unit has them: the home of its user is the state directory, /tmp is its own.
    environment = {"HOME": str(state), "TMPDIR": str(state / "tmp")}
    async with serve(config, environment), Client.connect(nats_server.url) as client:
        # Seeds, tables, a snapshot, tests and a unit test.
        accepted = await client.submit("shop", ["build"], target="dev")
        end = (await whole_run(client, accepted.run_id))[-1]
    assert isinstance(end, RunFinished)
    assert end.status is RunStatus.SUCCESS, end
    assert {path.relative_to(project) for path in project.rglob("*")} == before
    assert os.listdir(state / "tmp") == []
