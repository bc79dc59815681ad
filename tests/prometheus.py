"""Prometheus for the tests: its programs found or fetched, a server of one's own, its answers.

`python -m tests.prometheus` sees to it that `prometheus`, `promtool` and `amtool` are there. On a
machine that has them on its PATH there is nothing to do. Otherwise, where apt has Debian's
packages, they are unpacked into .venvs/prometheus and not installed: no service is started that
would hold port 9090, and nothing of the machine changes. Where there is no apt it says what to
install; the tests then skip, but not in CI.
"""

import asyncio
import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # dbt brings it

ROOT = Path(__file__).parents[1]
DEPLOYED = ROOT / "deploy" / "prometheus"
UNPACKED = ROOT / ".venvs" / "prometheus"
PROGRAMS = ("prometheus", "promtool", "amtool")
PACKAGES = ("prometheus", "prometheus-alertmanager")
MISSING = (
    f"install Debian's packages {' and '.join(PACKAGES)}, or put {', '.join(PROGRAMS)} on PATH"
)

START_LIMIT_S = 30.0
DATA_LIMIT_S = 30.0


def find(program: str) -> str | None:
    unpacked = UNPACKED / "usr" / "bin" / program
    return shutil.which(program) or (str(unpacked) if unpacked.is_file() else None)


def need(program: str) -> str:
    """Its path. Skips the test where there is none, except in CI."""
    if (path := find(program)) is not None:
        return path
    reason = f"no {program} here: {MISSING}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def fetch() -> bool:
    """True when all programs are there, fetched or not."""
    if all(find(program) for program in PROGRAMS):
        return True
    if shutil.which("apt-get") is None:
        return False
    if not _download() and (os.geteuid() != 0 or not _run("apt-get", "update") or not _download()):
        return False
    return all(find(program) for program in PROGRAMS)


def _download() -> bool:
    """The packages' files, unpacked."""
    UNPACKED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # As whoever we are: root's download otherwise warns that `_apt` may not write here.
        user = ("-o", f"APT::Sandbox::User={getpass.getuser()}")
        if not _run("apt-get", *user, "download", *PACKAGES, folder=folder):
            return False
        packages = Path(folder).glob("*.deb")
        return all(_run("dpkg-deb", "--extract", str(each), str(UNPACKED)) for each in packages)


def _run(*command: str, folder: str | None = None) -> bool:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL)
    return done.returncode == 0


@dataclass
class Prometheus:
    """A server that runs, and what it answers."""

    url: str
    log: Path

    async def ask(self, path: str, **parameters: str | float) -> Any:
        """The `data` of its HTTP API. Raises PromqlError with what it says."""
        query = urllib.parse.urlencode(parameters)
        return await asyncio.to_thread(_get, f"{self.url}/api/v1/{path}?{query}")

    async def value(self, expr: str) -> list[dict[str, Any]]:
        """The series now: each `metric` and `value`."""
        answer = await self.ask("query", query=expr)
        if answer["resultType"] == "scalar":
            return [{"metric": {}, "value": answer["result"]}]
        series: list[dict[str, Any]] = answer["result"]
        return series

    async def course(self, expr: str, since: float, step_s: float = 1.0) -> list[dict[str, Any]]:
        """The series since a time: each `metric` and `values`."""
        answer = await self.ask(
            "query_range", query=expr, start=since, end=time.time(), step=step_s
        )
        series: list[dict[str, Any]] = answer["result"]
        return series

    async def has_series(self, selector: str, since: float) -> bool:
        found = await self.ask("series", **{"match[]": selector, "start": str(since)})
        return bool(found)

    async def until(self, expr: str, fact: Callable[[list[float]], bool] = bool) -> None:
        """Until the values of the expression are as they should be; of any, if not said."""
        values: list[float] = []
        try:
            async with asyncio.timeout(DATA_LIMIT_S):
                while not fact(values):
                    values = [float(series["value"][1]) for series in await self.value(expr)]
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{expr} stayed {values}") from None


class PromqlError(Exception):
    pass


@asynccontextmanager
async def prometheus(folder: Path, target: str, *, scrape_s: int = 1) -> AsyncIterator[Prometheus]:
    """A server with deploy/prometheus as it is, but for the scraped address and the intervals."""
    config = _config_for(folder, target, f"{scrape_s}s")
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            need("prometheus"),
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
        )
    try:
        yield Prometheus(await _address(log, process), log)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _config_for(folder: Path, target: str, interval: str) -> Path:
    config = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    (folder / "rules").mkdir(parents=True)
    for source in sorted((DEPLOYED / "rules").glob("*.yml")):
        rules = yaml.safe_load(source.read_text(encoding="utf-8"))
        for group in rules["groups"]:
            group.pop("interval", None)  # some are slower than a test can wait
        _write(folder / "rules" / source.name, rules)
    return _write(folder / "prometheus.yml", config)


def _write(path: Path, document: Any) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


async def _address(log: Path, process: asyncio.subprocess.Process) -> str:
    """Where it listens, which it says once it answers."""
    async with asyncio.timeout(START_LIMIT_S):
        while True:
            said = await asyncio.to_thread(log.read_text, encoding="utf-8")
            assert process.returncode is None, said
            if found := re.search(r'"Listening on" address=(\S+)', said):
                server = Prometheus(f"http://{found[1]}", log)
                break
            await asyncio.sleep(0.05)
        while True:
            try:
                await server.ask("query", query="vector(1)")
            except (OSError, PromqlError):
                await asyncio.sleep(0.05)
            else:
                return server.url


def _get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310  # loopback
            body = json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            said = error.read().decode(errors="replace")
        raise PromqlError(said) from None
    return body["data"]


def main() -> None:
    if not fetch():
        sys.stderr.write(f"The tests of dashboards and alerts will skip: {MISSING}.\n")


if __name__ == "__main__":
    main()
