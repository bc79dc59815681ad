"""The unit file: systemd understands it, and waits for as long as a stop may take.

That dbt can work under it, tests/acceptance/test_deploy_hardening.py shows.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dbtstream.cli import EXIT_CONFIG
from dbtstream.config import WorkerConfig
from dbtstream.daemon import stop_budget_s

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "dbtstream.service"


has_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="this machine has no systemd"
)


def setting(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    return str(value)


def test_systemd_waits_longer_than_all_steps_of_a_stop_together() -> None:
    assert int(setting("TimeoutStopSec")) > stop_budget_s(WorkerConfig())
    assert f"{stop_budget_s(WorkerConfig()):.0f} s at the most" in UNIT.read_text(encoding="utf-8")


def test_a_wrong_config_is_not_started_again_and_again() -> None:
    assert int(setting("RestartPreventExitStatus")) == EXIT_CONFIG


@has_systemd
def test_systemd_finds_nothing_wrong_with_it(tmp_path: Path) -> None:
    """But for the command, which is not installed there on a test machine."""
    text = UNIT.read_text(encoding="utf-8")
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace(setting("ExecStart").split()[0], "/bin/true"), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],  # found above
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@has_systemd
def test_it_is_as_closed_as_its_header_says() -> None:
    (stated,) = re.findall(r"an exposure of (\d+\.\d)", UNIT.read_text(encoding="utf-8"))
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    (found,) = re.findall(r"Overall exposure level for \S+: (\d+\.\d)", done.stdout)
    assert float(found) <= float(stated)


def test_nothing_that_dbt_needs_is_closed() -> None:
    """What a daemon and its dbt do on every run: the network, forks, threads, their own files."""
    assert {"AF_INET", "AF_INET6", "AF_UNIX"} <= set(setting("RestrictAddressFamilies").split())
    text = UNIT.read_text(encoding="utf-8")
    for closed in ("PrivateNetwork", "ProcSubset", "IPAddressDeny", "NoExecPaths", "TasksMax"):
        assert f"\n{closed}=" not in text
    assert setting("StateDirectory") == "dbtstream"
    assert setting("Environment") == "DBTSTREAM__WORKER__STATE_DIR=/var/lib/dbtstream"
