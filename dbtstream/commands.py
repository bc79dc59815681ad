"""What each command of `dbtstream` does; `cli` reads the words, this does the work.

Each function is async, prints to the terminal, and returns the exit code. They talk to a
daemon through `client` alone. Errors of ours rise to `cli.main`, which prints one line.
"""

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dbtstream.client import Client, EventsGone
from dbtstream.config import Config, NatsConfig, ProjectConfig
from dbtstream.errors import RunNotFound
from dbtstream.events import encode_event
from dbtstream.messages import CancelAccepted, OnBusy, OnLost, RunView, StateFrom
from dbtstream.selection import Selection, Words
from dbtstream.subjects import is_run_id

if TYPE_CHECKING:
    from rich.console import Console

    from dbtstream.daemon import Daemon

CLIENT_NAME = "dbtstream cli"
INTERRUPTED = 130
WIDTH_OF_A_FILE = 160
CONNECT_S = 5.0
RECENT = 500  # runs among which a prefix of a run id is looked for
DEMO_ARGS = ["build"]
DEMO_PORT = 4333
DEMO_AGAIN = "flights -- build --select marts"


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A run as the command line asked for it."""

    project: str
    args: list[str]
    target: str | None = None
    vars: dict[str, Any] = {}
    labels: dict[str, str] = {}
    request_id: str | None = None
    timeout_s: float | None = None
    reason: str | None = None
    on_busy: OnBusy = OnBusy.QUEUE
    on_lost: OnLost | None = None
    retry_of: str | None = None
    state: StateFrom | None = None


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """How to show a run."""

    as_json: bool = False
    plain: bool = False


# -- the daemon ------------------------------------------------------------------------------


async def serve(config: Config) -> int:
    from dbtstream.daemon import Daemon

    daemon = Daemon(config)
    daemon.install_signal_handlers(asyncio.get_running_loop())
    settling = asyncio.create_task(_settle(daemon), name="settle")
    try:
        await daemon.run()
    finally:
        settling.cancel()
    return 0


async def _settle(daemon: "Daemon") -> None:
    """What is there when requests are served is there to stay: to go through it once more took the
    collector of garbage 0.2 s in the middle of the first runs, and held up their events."""
    with contextlib.suppress(Exception):  # a start that fails is told by `run`
        await daemon.ready()
        gc.freeze()


async def setup(nats: NatsConfig, config: Config) -> int:
    from dbtstream.nats_link import NatsLink
    from dbtstream.streams import ensure_streams

    async with NatsLink(nats, name=CLIENT_NAME, source=config.source) as link:
        await link.wait_connected(CONNECT_S)
        for line in await ensure_streams(link, config.streams):
            say(line)
    return 0


async def check(config: Config, *, as_json: bool) -> int:
    from dbtstream.checks import Check, run_checks

    checks = [Check(subject="config", ok=True, found=config.source)]
    if not as_json:
        _say_check(checks[0])
    async for one in run_checks(config):
        checks.append(one)
        if not as_json:
            _say_check(one)
    failed = sum(not one.ok for one in checks)
    if as_json:
        say(msgspec.json.encode(checks).decode())
    elif failed:
        say(f"{failed} of {len(checks)} checks failed")
    return 1 if failed else 0


def _say_check(one: Any) -> None:
    say(f"{'✓' if one.ok else '✗'} {one.subject}: {one.found}")
    if one.mend:
        say(f"    → {one.mend}")


# -- runs ------------------------------------------------------------------------------------


async def run(nats: NatsConfig, submission: Submission, output: Output, *, detach: bool) -> int:
    async with connect(nats) as client:
        if detach:
            accepted = await _submit(client, submission)
            say(msgspec.json.encode(accepted).decode() if output.as_json else accepted.run_id)
            return 0
        return await _run_and_follow(client, submission, output, again="dbtstream show {run_id}")


async def run_folder(
    folder: Path,
    submission: Submission,
    output: Output,
    *,
    profiles_dir: Path | None,
    python: str | None,
) -> int:
    from dbtstream.local_run import local_daemon, project_of_folder

    name, project = project_of_folder(
        folder,
        submission.args,
        target=submission.target,
        profiles_dir=profiles_dir,
        python=python,
    )
    here = msgspec.structs.replace(submission, project=name, target=project.targets[0])
    async with (
        local_daemon(name, project, source=f"--project-dir {folder}") as url,
        Client.connect(url, name=CLIENT_NAME) as client,
    ):
        return await _run_and_follow(client, here, output, again=None)


async def _submit(client: Client, submission: Submission) -> Any:
    from dbtstream.follow import user_name

    return await client.submit(
        submission.project,
        submission.args,
        target=submission.target,
        vars=submission.vars,
        labels=submission.labels,
        request_id=submission.request_id,
        timeout_s=submission.timeout_s,
        reason=submission.reason,
        requested_by=user_name(),
        on_busy=submission.on_busy,
        on_lost=submission.on_lost,
        retry_of=submission.retry_of,
        state=submission.state,
    )


async def _run_and_follow(
    client: Client, submission: Submission, output: Output, *, again: str | None
) -> int:
    from dbtstream.follow import Follower
    from dbtstream.screen import view_for

    accepted = await _submit(client, submission)
    hint = again.format(run_id=accepted.run_id) if again else None
    view = view_for(submission.args, as_json=output.as_json, plain=output.plain)
    with view:
        if accepted.duplicate:
            view.note(f"This request_id has already been sent; showing its run {accepted.run_id}")
        left = f"Left. The run goes on being cancelled; see it with: {hint}"
        follower = Follower(client, accepted, view, when_left=left if hint else "Stopping dbt.")
        code = await follower.run()
        if not follower.left:
            view.summary(hint)
    return code


# -- looking ---------------------------------------------------------------------------------


async def tail(
    nats: NatsConfig,
    wanted: Selection,
    *,
    since: datetime | None,
    run: str | None,
    as_json: bool,
) -> int:
    from dbtstream.terminal import plain_line

    async with connect(nats) as client:
        run_id = await find_run(client, run) if run else None
        async with client.events(
            project=wanted.project,
            target=wanted.target,
            family=wanted.family,
            kind=wanted.kind,
            name=wanted.name,
            status=wanted.status,
            since=since,
            run_id=run_id,
        ) as events:
            async for event in events:
                if as_json:
                    say(encode_event(event).decode())
                elif line := plain_line(event):
                    say(line)
    return 0


async def ps(nats: NatsConfig, *, project: str | None, everything: bool, as_json: bool) -> int:
    from dbtstream.tables import runs_table

    async with connect(nats) as client:
        runs = await client.list(project=project, active=not everything)
    if as_json:
        say(msgspec.json.encode(runs).decode())
    elif not runs.runs and not any(runs.waiting.values()):
        say("no runs" if everything else "nothing runs or waits; --all shows runs that have ended")
    else:
        console_of_stdout().print(runs_table(runs, datetime.now(UTC)))
    return 0


async def show(nats: NatsConfig, run: str, *, as_json: bool) -> int:
    from dbtstream.tables import run_summary, view_lines
    from dbtstream.terminal import RunPicture

    async with connect(nats) as client:
        view = await client.get(await find_run(client, run))
        picture = RunPicture()
        async with client.events(
            project=view.project, target=view.target, run_id=view.run_id, follow=False
        ) as events:
            async for event in events:
                picture.apply(event)
    if as_json:
        shown = {"run": view, "finished": picture.finished, "rejected": picture.rejected}
        say(msgspec.json.encode(shown).decode())
        return 0
    console = console_of_stdout()
    console.print(view_lines(view, datetime.now(UTC)))
    console.print(run_summary(picture))
    if view.status.is_terminal and picture.finished is None and picture.rejected is None:
        raise EventsGone(view)
    return 0


async def verify(nats: NatsConfig, run: str, *, as_json: bool) -> int:
    from dbtstream.terminal import plural

    async with connect(nats) as client:
        # Not `find_run`, which asks a daemon: after a crash there may be none.
        run_id = run if is_run_id(run) else pick_run(run, await client.stored_runs(limit=RECENT))
        found = await client.verify(run_id)
    if as_json:
        say(msgspec.json.encode(found).decode())
        return 0 if found.agrees else 1
    for difference in found.differences:
        say(str(difference))
    verdict = "agrees" if found.agrees else plural(len(found.differences), "difference")
    told = f"{plural(found.events, 'event')}, {plural(found.nodes, 'node')}"
    say(f"{verdict}: {told}, run_results.json {found.run_results}")
    return 0 if found.agrees else 1


async def cancel(nats: NatsConfig, run: str, *, reason: str | None) -> int:
    from dbtstream.follow import user_name

    async with connect(nats) as client:
        run_id = await find_run(client, run)
        answer: CancelAccepted = await client.cancel(run_id, by=user_name(), reason=reason)
    if answer.status.is_terminal:
        say(f"run {run_id} had already ended: {answer.status}")
    else:
        say(f"cancelling run {run_id}, which was {answer.status}")
    return 0


def connect(nats: NatsConfig) -> AbstractAsyncContextManager[Client]:
    return Client.connect(config=nats, name=CLIENT_NAME, timeout_s=CONNECT_S)


async def find_run(client: Client, text: str) -> str:
    """A run id, the beginning or the end of just one of the recent ones, or `last`."""
    return text if is_run_id(text) else pick_run(text, (await client.list(limit=RECENT)).runs)


def pick_run(text: str, runs: Sequence[RunView]) -> str:
    """Of these, newest first, the one that `text` means. Raises RunNotFound."""
    if text == "last" and runs:
        return runs[0].run_id
    found = [r.run_id for r in runs if r.run_id.startswith(text) or r.run_id.endswith(text)]
    if len(found) != 1:
        raise RunNotFound(f"{text}, which fits {len(found)} of them," if found else text)
    return found[0]


# -- demo and schema -------------------------------------------------------------------------


async def demo(*, keep: bool, port: int | None, output: Output) -> int:
    from dbtstream.local_run import DEMO_PROJECT, DEMO_TARGET, copy_demo, local_daemon

    tell = _say_nothing if output.as_json else say
    with tempfile.TemporaryDirectory(prefix="dbtstream-demo-") as folder:
        project: ProjectConfig = await asyncio.to_thread(copy_demo, Path(folder) / DEMO_PROJECT)
        async with (
            local_daemon(DEMO_PROJECT, project, port=port, source="the demo") as url,
            Client.connect(url, name=CLIENT_NAME) as client,
        ):
            tell(f"NATS listens on {url}; a daemon serves project {DEMO_PROJECT} of {project.path}")
            tell(f"Publishing a request to dbt.runs.{DEMO_PROJECT}.{DEMO_TARGET}: dbt build")
            submission = Submission(project=DEMO_PROJECT, target=DEMO_TARGET, args=DEMO_ARGS)
            code = await _run_and_follow(client, submission, output, again=None)
            if code != INTERRUPTED:
                tell(_demo_hints(url, keep=keep))
                if keep:
                    await _until_interrupted()
    return code


def _demo_hints(url: str, *, keep: bool) -> str:
    """Commands that work as they stand, in another terminal."""
    if not keep:
        url = f"nats://127.0.0.1:{DEMO_PORT}"
    ours = f"dbtstream --nats {url}"
    hints = {
        f"{ours} tail --since 10m": "what just happened",
        f"{ours} tail --family node --status error": "only what fails, as it comes",
        f"{ours} run {DEMO_AGAIN}": "another run",
        f"{ours} lineage flights --node routes --up --columns": "what it was made from",
        f"nats -s {url} sub 'dbt.live.>'": "with any NATS client, in any language",
    }
    width = max(map(len, hints))
    lines = [f"  {command:<{width}}  # {what}" for command, what in hints.items()]
    if keep:
        head = "In another terminal (Ctrl-C here stops the server and the daemon):"
    else:
        head = f"To try it yourself: dbtstream demo --keep --port {DEMO_PORT}, then elsewhere"
    return "\n".join(["", head, *lines])


def _say_nothing(_: str) -> None:
    """With --json only events go to stdout."""


async def _until_interrupted() -> None:
    loop = asyncio.get_running_loop()
    interrupted = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    try:
        await interrupted.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def schema(*, output: Path | None, compare: Path | None) -> int:
    """Not async: nothing here leaves this machine."""
    from dbtstream.schema import broken_promises, check_schemas, documents, write_schemas

    if compare is not None:
        problems = check_schemas(compare)
        for problem in problems:
            say(problem)
        if not problems:
            say(f"{compare} is what this version writes")
        return 1 if problems else 0
    if output is not None:
        if broken := broken_promises(output):
            say("\n".join(broken))
            say(f"nothing written to {output}: remove what is there if that is what you mean")
            return 1
        for path in write_schemas(output):
            say(str(path))
        return 0
    for _, document in sorted(documents().items()):
        say(json.dumps(document, indent=2, ensure_ascii=False))
    return 0


def say(text: str) -> None:
    """One line to stdout, at once: whoever reads the pipe is waiting for it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def console_of_stdout() -> "Console":
    """Into a pipe or a file, tables are as wide as they need to be."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def leave_quietly() -> None:
    """The reader of our stdout went away (`| head`): no error of ours, nor of the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def words(values: Sequence[str]) -> Words:
    return set(values) or None
