"""Asking a project's interpreter something, by a small script that answers in one line of JSON.

`checks` and `duckdb_file` ask so what only dbt, or the libraries that come with it, can say. Its
process gets the environment of the project's dbt, a time limit, and no second chance.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from dbtstream.config import ProjectConfig

_MARK = b"@@dbtstream "
PRINT_ANSWER = r"""
print("\n@@dbtstream " + json.dumps(out))
"""
"""A script ends with this. What else is printed, by some startup file, does not count."""

T = TypeVar("T")


class NoAnswer(Exception):
    """The interpreter did not answer; the text says how."""


async def ask_python(
    project: ProjectConfig,
    script: str,
    *arguments: str,
    environment: Mapping[str, str],
    limit_s: float,
    answer: type[T],
) -> T:
    """In the project's folder, as its dbt would be. Raises NoAnswer."""
    try:
        process = await asyncio.create_subprocess_exec(
            project.python,
            "-c",
            script,
            *arguments,
            cwd=project.path,
            env=dict(environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise NoAnswer(error.strerror or str(error)) from error
    try:
        async with asyncio.timeout(limit_s):
            out, err = await process.communicate()
    except TimeoutError:
        raise NoAnswer(f"did not answer within {limit_s:g} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    try:
        return msgspec.json.decode(out.rpartition(_MARK)[2], type=answer)
    except msgspec.DecodeError:
        tail = err.decode(errors="replace").strip().splitlines()[-1:]
        raise NoAnswer("; ".join(["is no Python that works", *tail])) from None
