"""What each command of `dbtstream dead` does; `cli_dead` reads the words, this does the work.

As `commands`: each function prints to the terminal and returns the exit code; errors rise to
`cli.main`, but for those of one letter among several. It asks NATS through `client` alone.
"""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from dbtstream.client import Client
from dbtstream.commands import connect, console_of_stdout, say
from dbtstream.config import NatsConfig
from dbtstream.dead_letters import DeadLetter, NoSuchLetter, NotReplayable


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters; None is any."""

    project: str | None = None
    target: str | None = None
    code: str | None = None


async def ls(nats: NatsConfig, wanted: Filter, *, limit: int, as_json: bool) -> int:
    from dbtstream.tables import letters_table

    async with connect(nats) as client:
        letters = await _letters(client, wanted, limit)
    if as_json:
        say(msgspec.json.encode(letters).decode())
    elif not letters:
        say("no dead letters" + (" that fit" if wanted != Filter() else ""))
    else:
        console_of_stdout().print(letters_table(letters, datetime.now(UTC)))
    return 0


async def show(nats: NatsConfig, letter_id: int, *, raw: bool) -> int:
    async with connect(nats) as client:
        letter, data = await client.dead_letters.get(letter_id)
    if raw:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return 0
    from dbtstream.tables import letter_lines

    console_of_stdout().print(letter_lines(letter))
    say("")
    say(readable(data))
    return 0


async def replay(
    nats: NatsConfig, letter_ids: Sequence[int], *, keep: bool, new_request_id: bool
) -> int:
    code = 0
    async with connect(nats) as client:
        letters = client.dead_letters
        for letter_id in letter_ids:
            try:
                again = await letters.replay(letter_id, new_request_id=new_request_id)
            except (NoSuchLetter, NotReplayable) as error:
                code = _complain(error)
                continue
            say(f"letter {letter_id} is request {again.stream_seq} now, of run {again.run_id}")
            if not keep:
                await letters.drop(letter_id)
    return code


async def drop(nats: NatsConfig, letter_ids: Sequence[int]) -> int:
    code = 0
    async with connect(nats) as client:
        for letter_id in letter_ids:
            try:
                await client.dead_letters.drop(letter_id)
            except NoSuchLetter as error:
                code = _complain(error)
            else:
                say(f"dropped letter {letter_id}")
    return code


async def drop_all(nats: NatsConfig, wanted: Filter) -> int:
    """Those that are there now; what comes meanwhile stays."""
    from dbtstream.terminal import plural

    count = 0
    async with connect(nats) as client:
        for letter in await _letters(client, wanted, None):
            try:
                await client.dead_letters.drop(letter.id)
            except NoSuchLetter:
                continue  # somebody else was quicker
            count += 1
    say(f"dropped {plural(count, 'letter')}")
    return 0


async def _letters(client: Client, wanted: Filter, limit: int | None) -> list[DeadLetter]:
    return await client.dead_letters.list(
        project=wanted.project, target=wanted.target, code=wanted.code, limit=limit
    )


def readable(data: bytes) -> str:
    """Indented if it is JSON; nothing in it reaches the terminal as a control character."""
    try:
        text = json.dumps(json.loads(data), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = data.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _complain(error: Exception) -> int:
    """As `cli` does for an error that ends the command; the exit code."""
    sys.stderr.write(f"dbtstream: {error}\n")
    return 1
