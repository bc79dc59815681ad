"""Dead letters on a real nats-server: listed, shown, asked for again, dropped."""

import asyncio
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dbtstream import dead_commands
from dbtstream.client import Client
from dbtstream.config import NatsConfig
from dbtstream.dead_commands import Filter, readable
from dbtstream.dead_letters import DeadLetter, NoSuchLetter, NotReplayable
from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsRefused
from dbtstream.events import AnyEvent, RunFinished, RunRejected
from dbtstream.statuses import RunStatus
from dbtstream.store import Store
from dbtstream.subjects import DEAD_STREAM, H_RUN_ID, RUNS_STREAM, new_run_id
from tests.daemons import Served, daemon_config, serving
from tests.guarantees import check_run
from tests.scripted_child import GOOD_RUN

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


async def ends(served: Served, count: int) -> list[AnyEvent]:
    """The first `count` ends of runs, waiting for them; each is a letter or a finished run."""
    found: list[AnyEvent] = []
    async with asyncio.timeout(60):
        async for event in served.client.events(family="run", since="all"):
            if isinstance(event, RunRejected | RunFinished):
                found.append(event)
                if len(found) == count:
                    break
    return found


async def letters_of(served: Served, *requests: tuple[str, bytes]) -> list[DeadLetter]:
    """Publish, wait until each is rejected; the letters, oldest first."""
    for subject, payload in requests:
        before = len(await served.client.dead_letters.list())
        await served.publish(subject, payload)
        async with asyncio.timeout(30):
            while len(await served.client.dead_letters.list()) == before:
                pass
    return (await served.client.dead_letters.list())[::-1]


async def queue_names(served: Served) -> set[str]:
    """Consumers of DBT_DEAD: listing must leave none."""
    return {info.name for info in await served.link.js.consumers_info(DEAD_STREAM)}


async def test_letters_are_listed_newest_first_with_what_their_headers_say(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        oldest, middle, newest = await letters_of(
            served,
            ("dbt.runs.shop.dev", b"no json"),
            ("dbt.runs.shop.prod", b'{"args":["clean"]}'),
            ("dbt.runs.shop.dev", b'{"args":[]}'),
        )
        rejected = await ends(served, 3)
        letters = served.client.dead_letters
        everything = await letters.list()
        of_prod = await letters.list(project="shop", target="prod")
        of_code = await letters.list(code="bad_message", limit=1)
        of_nobody = await letters.list(project="crm")
        assert await queue_names(served) == set()

    assert everything == [newest, middle, oldest]
    assert [letter.id for letter in everything] == [3, 2, 1]
    assert (of_prod, of_code, of_nobody) == ([middle], [newest], [])
    assert (middle.project, middle.target, middle.code) == ("shop", "prod", "command_not_allowed")
    assert (middle.subject, middle.field, middle.size) == ("dbt.runs.shop.prod", "args", 18)
    assert (middle.request_seq, middle.truncated) == (2, False)
    assert "does not allow `dbt clean`" in middle.message
    assert {letter.run_id for letter in everything} == {event.run_id for event in rejected}
    assert datetime.now(UTC) - timedelta(minutes=5) < middle.at < datetime.now(UTC)


async def test_a_request_replayed_when_its_reason_is_gone_runs_in_the_trace_of_its_cause(
    tmp_path: Path, nats_config: NatsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody served the target; now somebody does."""
    monkeypatch.setattr("dbtstream.unknown_subjects.GRACE_S", 0.0)
    payload = b'{ "args": ["build"], "labels": {"team": "core"} }'
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        parent = f"00-{TRACE_ID}-b7ad6b7169203331-01"
        await served.publish("dbt.runs.shop.staging", payload, traceparent=parent)
        (rejected,) = await ends(served, 1)
    more = {"targets": ("dev", "staging")}
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN, project=more)) as served:
        again = await served.client.dead_letters.replay(1)
        events = await served.events(again.run_id)
        _, data = await served.client.dead_letters.get(1)

    check_run(events)
    assert isinstance(events[-1], RunFinished)
    assert (events[-1].status, events[-1].target) == (RunStatus.SUCCESS, "staging")
    assert again.run_id != rejected.run_id
    assert (again.subject, again.stream_seq) == ("dbt.runs.shop.staging", 2)
    assert {event.trace_id for event in events} == {TRACE_ID}
    assert {tuple(event.labels.items()) for event in events} == {(("team", "core"),)}
    assert data == payload  # the letter is still there


async def test_a_request_id_that_its_own_rejected_run_had_goes_over_to_the_replay(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    """As control remembers it before a worker rejects; else each replay were a duplicate."""
    run_id = new_run_id(datetime.now(UTC))
    payload = b'{"args":["deps"],"request_id":"nightly"}'
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        await Store(served.link).remember_request("shop", "dev", "nightly", run_id)
        await served.publish("dbt.runs.shop.dev", payload, **{H_RUN_ID: run_id})
        (rejected,) = await ends(served, 1)
    assert isinstance(rejected, RunRejected)
    assert (rejected.run_id, rejected.code) == (run_id, "command_not_allowed")

    allowed = {"commands": ("build", "deps")}
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN, project=allowed)) as served:
        again = await served.client.dead_letters.replay(1)
        events = await served.events(again.run_id)
        await served.publish("dbt.runs.shop.dev", payload)
        *_, third = await ends(served, 3)

    assert isinstance(events[-1], RunFinished)
    assert again.run_id != run_id
    assert isinstance(third, RunRejected)
    assert third.code == "duplicate"
    assert again.run_id in third.message


async def test_a_replay_whose_sender_died_half_way_can_be_repeated(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    """The request_id was given to a run of which nobody ever heard."""
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        await letters_of(served, ("dbt.runs.shop.dev", b'{"args":["deps"],"request_id":"x"}'))
        await Store(served.link).remember_request("shop", "dev", "x", new_run_id(datetime.now(UTC)))
        again = await served.client.dead_letters.replay(1)
        _, rejected = await ends(served, 2)
    assert isinstance(rejected, RunRejected)
    assert (rejected.run_id, rejected.code) == (again.run_id, "command_not_allowed")


async def test_a_duplicate_is_replayed_only_under_a_new_request_id(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    payload = b'{"args":["build"],"request_id":"nightly"}'
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        await served.publish("dbt.runs.shop.dev", payload)
        await served.publish("dbt.runs.shop.dev", payload)
        first, _ = await ends(served, 2)
        letters = served.client.dead_letters
        with pytest.raises(NotReplayable, match=f"run {first.run_id} .success.*--new-request-id"):
            await letters.replay(1)
        assert len(await ends(served, 2)) == 2
        again = await letters.replay(1, new_request_id=True)
        events = await served.events(again.run_id)

    assert isinstance(events[-1], RunFinished)
    assert events[-1].status is RunStatus.SUCCESS


async def test_what_would_be_rejected_again_for_sure_is_not_published(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    expired = json.dumps({"args": ["build"], "not_after": past}).encode()
    huge = b'{"args":["' + b"x" * 1_030_000 + b'"]}'
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        letters = served.client.dead_letters
        *_, cut = await letters_of(
            served, ("dbt.runs.shop.dev", expired), ("dbt.runs.shop.dev", huge)
        )
        assert (cut.size, cut.truncated) == (len(huge), True)
        with pytest.raises(NotReplayable, match="not to begin after"):
            await letters.replay(1)
        with pytest.raises(NotReplayable, match=f"only 1024000 of its {len(huge)} bytes"):
            await letters.replay(2)
        await served.queue_empty()
        info = await served.link.js.stream_info(RUNS_STREAM)
    assert info.state.last_seq == 2


async def test_a_dropped_letter_is_gone_and_others_stay(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        letters = served.client.dead_letters
        await letters_of(served, *[("dbt.runs.shop.dev", b"x%d" % n) for n in range(3)])
        await letters.drop(2)
        assert [letter.id for letter in await letters.list()] == [3, 1]
        for call in (letters.drop, letters.get, letters.replay):
            with pytest.raises(NoSuchLetter, match=r"no dead letter 2 .`dbtstream dead ls`"):
                await call(2)


async def test_without_the_stream_the_error_says_what_makes_it(nats_config: NatsConfig) -> None:
    code, out, err = await dbtstream(nats_config, "dead", "ls")
    assert (code, out) == (1, "")
    assert "there is no stream DBT_DEAD (`dbtstream setup` creates it)" in err
    assert len(err.splitlines()) == 1


# -- the commands ----------------------------------------------------------------------------


async def dbtstream(nats: NatsConfig, *words: str) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of the command as a process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from dbtstream.cli import main; main()"),
        *("--nats", nats.servers[0], *words),
        cwd=Path(__file__).parents[2],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, problems = await process.communicate()
    return process.returncode, output.decode(), problems.decode()


async def test_the_commands_from_ls_to_drop(tmp_path: Path, nats_config: NatsConfig) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        assert await dbtstream(nats_config, "dead", "ls") == (0, "no dead letters\n", "")
        await letters_of(
            served,
            ("dbt.runs.shop.dev", b'{"args":["clean"],"vars":{"n":1}}'),
            ("dbt.runs.shop.prod", b"\x1b[2J\xff\n"),
            ("dbt.runs.shop.prod", b"x"),
        )
        code, out, err = await dbtstream(nats_config, "dead", "ls", "--limit", "2")
        assert (code, err) == (0, "")
        heading, newest, _ = out.splitlines()
        assert heading.split() == ["id", "since", "project.target", "code", "size", "message"]
        assert newest.split()[0] == "3"
        assert newest.split()[2:5] == ["shop.prod", "bad_message", "1"]

        code, out, err = await dbtstream(nats_config, "dead", "ls", "--json", "--target", "dev")
        (listed,) = json.loads(out)
        assert (listed["id"], listed["code"], listed["size"]) == (1, "command_not_allowed", 33)

        code, out, err = await dbtstream(nats_config, "dead", "show", "1")
        assert (code, err) == (0, "")
        assert "does not allow `dbt clean`" in out
        assert '  "vars": {\n    "n": 1\n  }\n' in out

        code, out, err = await dbtstream(nats_config, "dead", "show", "2")
        assert (code, out.splitlines()[-2:]) == (0, [r"\x1b[2J\xff", ""])

        code, out, err = await dbtstream(nats_config, "dead", "replay", "1", "9")
        assert code == 1
        assert out.startswith("letter 1 is request 4 now, of run ")
        assert err == (
            "dbtstream: there is no dead letter 9 (`dbtstream dead ls` lists those that are)\n"
        )
        run_id = out.split()[-1]
        assert (await ends(served, 4))[-1].run_id == run_id  # rejected again: letter 4

        code, out, err = await dbtstream(
            nats_config, "dead", "drop", "--all", "--target", "prod", "--yes"
        )
        assert (code, out, err) == (0, "dropped 2 letters\n", "")
        assert [letter.id for letter in await served.client.dead_letters.list()] == [4]
        code, out, err = await dbtstream(nats_config, "dead", "drop", "4", "5")
        assert (code, out) == (1, "dropped letter 4\n")
        assert "no dead letter 5" in err


async def test_raw_prints_the_bytes_as_they_came(
    tmp_path: Path, nats_config: NatsConfig, capsysbinary: Any
) -> None:
    payload = b'\x1b[2J\xff\x00 "\xc3\xa9"\r\n'
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        await letters_of(served, ("dbt.runs.shop.dev", payload))
        capsysbinary.readouterr()
        assert await dead_commands.show(nats_config, 1, raw=True) == 0
    assert capsysbinary.readouterr().out == payload


def test_nothing_that_is_shown_moves_the_cursor() -> None:
    assert readable(b'\x1b[2J\xff\x00 "\xc3\xa9"\r\n') == '\\x1b[2J\\xff\\x00 "é"\\r\n'
    assert readable(b'{"a": "\\u001b[2J"}') == '{\n  "a": "\\u001b[2J"\n}'
    assert readable(b"[" * 100_000).startswith("[[[")
    assert readable('{"a": "\x9b2J"}'.encode()) == '{\n  "a": "\\x9b2J"\n}'


async def test_replaying_keeps_the_letter_where_it_is_told_to(
    tmp_path: Path, nats_config: NatsConfig
) -> None:
    async with serving(daemon_config(tmp_path, nats_config, GOOD_RUN)) as served:
        await letters_of(served, ("dbt.runs.shop.dev", b"no json"))
        for keep, left in ((True, [1]), (False, [])):
            await dead_commands.replay(nats_config, [1], keep=keep, new_request_id=False)
            kept = await served.client.dead_letters.list()
            assert [letter.id for letter in kept if letter.id == 1] == left
        await ends(served, 3)
        assert await dead_commands.drop_all(nats_config, Filter(code="bad_message")) == 0
        assert await served.client.dead_letters.list() == []


async def test_who_may_not_read_dead_letters_is_told_so_at_once(tmp_path: Path) -> None:
    """Not after a time-out, as nats-py has it for a denied request."""
    users = 'authorization { users: [{user: u, password: p, permissions: {publish: "x"}}] }'
    async with (
        NatsServer.start(tmp_path, config_extra=users) as server,
        Client.connect(server.url.replace("//", "//u:p@")) as client,
    ):
        letters = client.dead_letters
        for call in (letters.list(), letters.get(1), letters.drop(1), letters.replay(1)):
            with pytest.raises(NatsRefused, match=r"(?i)permissions violation"):
                await call
