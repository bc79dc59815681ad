"""dbt processes that behave badly, under a daemon in a process of its own."""

import asyncio
from pathlib import Path

from dbtstream.client import Client
from dbtstream.embedded import NatsServer
from dbtstream.events import NodeFinished, NodeStarted, RunCancel
from dbtstream.statuses import NodeStatus, RunStatus
from tests.daemons import project_folder
from tests.faults.conftest import Figure
from tests.faults.form import form
from tests.faults.harness import ended, linked, serving, submit, until, write_config
from tests.guarantees import check_run
from tests.scripted_child import GOOD_RUN, scripted_child

STDERR_BYTES = form(10, 100) * 1024 * 1024
MEMORY_BYTES = 8 * 1024 * 1024
"""What the daemon may grow by, at most, over such a run. Garbage that waits is part of it."""

DEAF = """
    import subprocess
    def deaf():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    start_line()
    deaf()
    hello()
    plan(model("orders"), model("customers", "orders"))
    started("orders")
    helper = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with open(%r, "w") as pids:
        pids.write(f"{os.getpid()} {helper.pid}\\n")
    while True:
        time.sleep(600)
"""
"""With a process of its own, which inherits what it ignores."""

LOUD = """
    start_line()
    hello()
    plan(model("orders"))
    started("orders")
    line = b"e" * 1023 + b"\\n"
    for _ in range(%d // len(line)):
        os.write(2, line)
    os.write(2, b"the last words\\n")
    finished("orders")
    result(0, [("orders", "success")])
"""


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def scripted_project(tmp_path: Path, body: str) -> dict[str, object]:
    return {
        "path": str(project_folder(tmp_path)),
        "targets": ["dev"],
        "python": scripted_child(tmp_path / "child", body),
    }


async def test_a_child_that_ignores_every_signal_is_killed_with_all_that_it_started(
    tmp_path: Path, nats_server: NatsServer, figure: Figure
) -> None:
    pids_file = tmp_path / "pids"
    config = write_config(
        tmp_path,
        nats_server,
        "w1",
        projects={"shop": scripted_project(tmp_path, DEAF % str(pids_file))},
        cancel_grace_s=0.5,
        kill_grace_s=0.5,
    )
    async with serving(config), linked(nats_server) as link:
        client = Client(link)
        run_id = await submit(link)
        await until(lambda: pids_file.exists() and pids_file.read_text().endswith("\n"))
        pids = [int(pid) for pid in pids_file.read_text().split()]
        assert all(map(alive, pids))
        await client.cancel(run_id, by="ada")
        run = await ended(link, run_id)
        left = [pid for pid in pids if alive(pid)]
    check_run(run.events)
    assert left == []
    assert run.verdict.status is RunStatus.CANCELLED
    steps = [event.step for event in run.events if isinstance(event, RunCancel)]
    assert steps == ["requested", "terminating", "killing"]
    ends = {e.node.name: e.status for e in run.events if isinstance(e, NodeFinished)}
    started = {e.node.name for e in run.events if isinstance(e, NodeStarted)}
    assert started == {"orders"}
    assert ends["customers"] is NodeStatus.NEVER_STARTED
    figure(f"{len(pids)} processes, {len(left)} left")


async def test_what_a_child_pours_out_on_stderr_costs_the_daemon_no_memory(
    tmp_path: Path, nats_server: NatsServer, figure: Figure
) -> None:
    config = write_config(
        tmp_path,
        nats_server,
        "w1",
        projects={"shop": scripted_project(tmp_path, GOOD_RUN)},
    )
    async with serving(config) as (daemon,), linked(nats_server) as link:
        assert (await ended(link, await submit(link))).verdict.status is RunStatus.SUCCESS
        before = daemon.peak_rss
        await asyncio.to_thread(scripted_child, tmp_path / "child", LOUD % STDERR_BYTES)
        run = await ended(link, await submit(link))
        grown = daemon.peak_rss - before
    check_run(run.events)
    assert run.verdict.status is RunStatus.SUCCESS
    assert grown < MEMORY_BYTES
    figure(
        f"{STDERR_BYTES >> 20} MiB on stderr, {grown >> 10} KiB more memory at most in the daemon"
    )
