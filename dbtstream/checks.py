"""What `dbtstream check` looks at, and how to mend what it finds.

From the outside in: config, NATS, JetStream, streams, then each project's interpreter, dbt,
profile and targets. A check that another one depends on comes first, and what cannot be
looked at is left out. The project checks run a small script in the project's interpreter
under a time limit, with the environment that its dbt would get; nothing connects to a
warehouse and nothing is changed.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec

from dbtstream.config import DEFAULT_TARGET, Config, NatsConfig, ProjectConfig, read_secret
from dbtstream.errors import ConfigError, NatsError
from dbtstream.nats_link import NatsLink
from dbtstream.project_python import PRINT_ANSWER, NoAnswer, ask_python
from dbtstream.streams import check_streams
from dbtstream.subjects import CONTROL
from dbtstream.telemetry import INSTALL, is_installed
from dbtstream.workspace import child_environment

CONNECT_S = 5.0
PROBE_S = 90.0  # the first import of dbt on a cold disk
MIN_PAYLOAD = 1024 * 1024

PROBE = (
    r"""
import json, os, sys

def look(out):
    from importlib import metadata
    names = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version
             for d in metadata.distributions()}
    out["dbt"] = names.get("dbt-core")
    if not out["dbt"] or out["dbt"].split(".")[0] != "1":
        return
    project, profile, targets = sys.argv[1], sys.argv[2] or None, sys.argv[3:]
    from argparse import Namespace
    from dbt import flags
    from dbt.cli.resolvers import default_profiles_dir
    from dbt_common.context import set_invocation_context
    set_invocation_context(os.environ)
    folder = os.environ.get("DBT_PROFILES_DIR") or str(default_profiles_dir())
    out["profiles_dir"] = folder
    flags.set_from_args(Namespace(PROFILES_DIR=folder, PROJECT_DIR=project), None)
    from dbt.config.runtime import load_profile
    for target in targets:
        found = {}
        try:
            loaded = load_profile(project, {}, profile, target or None)
            kind = loaded.credentials.type
            found = {"type": kind, "name": loaded.target_name, "profile": loaded.profile_name,
                     "adapter": names.get("dbt-" + kind)}
        except Exception as error:
            found = {"error": " ".join(str(error).split()) or type(error).__name__}
        out["targets"].append(found)

out = {"python": "%d.%d.%d" % sys.version_info[:3], "targets": []}
try:
    look(out)
except Exception as error:
    out["error"] = type(error).__name__ + ": " + " ".join(str(error).split())
"""
    + PRINT_ANSWER
)


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing looked at. `mend` says what to do, where it is not ok."""

    subject: str
    ok: bool
    found: str
    mend: str = ""


class TargetFound(msgspec.Struct, frozen=True):
    type: str | None = None
    name: str | None = None
    profile: str | None = None
    adapter: str | None = None
    error: str | None = None


class ProbeResult(msgspec.Struct, frozen=True):
    """What PROBE prints."""

    python: str
    dbt: str | None = None
    profiles_dir: str | None = None
    targets: list[TargetFound] = []
    error: str | None = None


async def run_checks(config: Config) -> AsyncIterator[Check]:
    """Everything after the config itself, which is there. Does not raise."""
    async for check in check_nats(config):
        yield check
    if config.telemetry.otlp is not None:
        yield check_telemetry()
    if not config.projects:
        yield Check(
            subject="projects",
            ok=False,
            found=f"{config.source} names none",
            mend='add a table like [projects.shop] with path = "/srv/shop" and targets = ["prod"]',
        )
    for name, project in config.projects.items():
        async for check in check_project(config, name, project):
            yield check


def check_telemetry() -> Check:
    """Whether what [telemetry.otlp] asks for can be done."""
    if is_installed():
        return Check(subject="telemetry", ok=True, found="OpenTelemetry's SDK is installed")
    return Check(
        subject="telemetry",
        ok=False,
        found="[telemetry.otlp] needs OpenTelemetry's SDK, which is not installed",
        mend=INSTALL,
    )


async def check_nats(config: Config) -> AsyncIterator[Check]:
    """The connection, JetStream and its limits, the streams, and whether a daemon is there."""
    where = ", ".join(config.nats.servers)
    try:
        async with NatsLink(config.nats, name="dbtstream check", source=config.source) as link:
            await link.wait_connected(CONNECT_S)
            client = link.client
            server = client.connected_server_version
            version = f"{server.major}.{server.minor}.{server.patch}"
            yield Check(subject="nats", ok=True, found=f"nats-server {version} at {where}")
            if client.max_payload < MIN_PAYLOAD:
                yield Check(
                    subject="nats max_payload",
                    ok=False,
                    found=f"{client.max_payload} bytes; an event may have {MIN_PAYLOAD}",
                    mend="set max_payload: 1MB in the server's config",
                )
            jetstream = await _jetstream(link)
            yield jetstream
            if not jetstream.ok:
                return
            yield await _streams(link, config)
            yield await _daemon(link)
    except ConfigError as error:
        yield Check(subject="nats", ok=False, found=str(error), mend="see [nats] in the config")
    except NatsError as error:
        yield Check(subject="nats", ok=False, found=str(error), mend=_mend_connection(config.nats))


def _mend_connection(nats: NatsConfig) -> str:
    if any("127.0.0.1" in url or "localhost" in url for url in nats.servers):
        return "start one with `nats-server -js`, or name yours in nats.servers or with --nats"
    return "check nats.servers, the credentials in [nats], and the network between"


async def _jetstream(link: NatsLink) -> Check:
    try:
        with link.translated("asking JetStream for its limits"):
            info = await link.js.account_info()
    except NatsError as error:
        return Check(
            subject="jetstream",
            ok=False,
            found=str(error),
            mend="start the server with `jetstream {}` in its config, or with -js",
        )
    limits = info.limits
    parts = [
        f"file store {_of(info.storage, limits.max_storage)}",
        f"memory {_of(info.memory, limits.max_memory)}",
        f"{_of(info.streams, limits.max_streams, unit='')} streams",
    ]
    full = 0 < limits.max_storage <= info.storage
    return Check(
        subject="jetstream",
        ok=not full,
        found=", ".join(parts),
        mend="the account's file store is full: raise its limit or delete streams" if full else "",
    )


def _of(used: int, limit: int, *, unit: str = "MB") -> str:
    if not unit:
        return f"{used} of {limit}" if limit > 0 else f"{used}"
    text = f"{used / 1024**2:.0f} {unit}"
    return f"{text} of {limit / 1024**2:.0f} {unit}" if limit > 0 else f"{text}, no limit"


async def _streams(link: NatsLink, config: Config) -> Check:
    try:
        problems = await check_streams(link, config.streams)
    except NatsError as error:
        return Check(
            subject="streams", ok=False, found=str(error), mend="give the user those permissions"
        )
    if not problems:
        return Check(subject="streams", ok=True, found="all there, as they should be")
    found = "; ".join(problems)
    if config.streams.manage:
        return Check(subject="streams", ok=True, found=f"`dbtstream serve` will mend: {found}")
    return Check(subject="streams", ok=False, found=found, mend="run `dbtstream setup`")


async def _daemon(link: NatsLink) -> Check:
    """Never a failure: check is what one runs before the first `serve`."""
    try:
        await link.request(f"{CONTROL}.list", b'{"limit":1}')
    except NatsError:
        return Check(subject="daemon", ok=True, found="none answers yet; start `dbtstream serve`")
    return Check(subject="daemon", ok=True, found="one answers control requests")


# -- projects --------------------------------------------------------------------------------


async def check_project(config: Config, name: str, project: ProjectConfig) -> AsyncIterator[Check]:
    """Its secrets, its interpreter and dbt, its profile and each of its targets."""
    subject = f"project {name}"
    try:
        environment = await asyncio.to_thread(_environment, config, name, project)
        probe = await _probe(project, environment)
    except ConfigError as error:
        yield Check(subject=subject, ok=False, found=str(error), mend="put the secret there")
        return
    except NoAnswer as error:
        yield Check(
            subject=f"{subject} python",
            ok=False,
            found=f"{project.python}: {error}",
            mend=f"set projects.{name}.python to an interpreter that has dbt",
        )
        return
    engine = _engine(subject, name, project, probe)
    yield engine
    if not engine.ok:
        return
    if probe.error is not None:
        yield Check(
            subject=f"{subject} profile",
            ok=False,
            found=probe.error,
            mend=f"run `dbt debug` in {project.path}",
        )
    for target, found in zip(project.targets, probe.targets, strict=False):
        yield _target(subject, name, target, found, probe)


def _environment(config: Config, name: str, project: ProjectConfig) -> dict[str, str]:
    environment = child_environment(project, os.environ)
    for variable, ref in project.secrets.items():
        environment[variable] = read_secret(
            ref, config.source, f"projects.{name}.secrets.{variable}"
        )
    if project.profiles_dir:
        environment["DBT_PROFILES_DIR"] = project.profiles_dir
    return environment | {"DBT_SEND_ANONYMOUS_USAGE_STATS": "0"}


async def _probe(project: ProjectConfig, environment: Mapping[str, str]) -> ProbeResult:
    """Run PROBE in the project's interpreter. Raises NoAnswer."""
    targets = ["" if target == DEFAULT_TARGET else target for target in project.targets]
    return await ask_python(
        project,
        PROBE,
        project.path,
        project.profile or "",
        *targets,
        environment=environment,
        limit_s=PROBE_S,
        answer=ProbeResult,
    )


def _engine(subject: str, name: str, project: ProjectConfig, probe: ProbeResult) -> Check:
    where = f"Python {probe.python} at {project.python}"
    if probe.dbt is None:
        return Check(
            subject=f"{subject} dbt",
            ok=False,
            found=f"dbt-core is not installed for {where}",
            mend=f"install it there with the adapter, or set projects.{name}.python",
        )
    supported = (1, 8) <= _release(probe.dbt) < (1, 13)
    return Check(
        subject=f"{subject} dbt",
        ok=supported,
        found=f"dbt-core {probe.dbt} on {where}",
        mend="" if supported else "dbt Core 1.8 to 1.12 can be run; install one of those",
    )


def _release(version: str) -> tuple[int, int]:
    parts = version.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        return 0, 0


def _target(subject: str, name: str, target: str, found: TargetFound, probe: ProbeResult) -> Check:
    subject = f"{subject} target {target}"
    profiles = str(Path(probe.profiles_dir or "") / "profiles.yml")
    if found.error is not None:
        return Check(
            subject=subject,
            ok=False,
            found=found.error,
            mend=f"mend {profiles}, or projects.{name}.targets, profile or profiles_dir",
        )
    adapter = f"dbt-{found.type} {found.adapter or ''}".rstrip()
    return Check(
        subject=subject,
        ok=True,
        found=f"{found.profile}.{found.name} of {profiles}, {adapter}",
    )
