"""The roles of deploy/nats on a real nats-server: what each may do, and that it may do no more.

The server is started from the files as they are, with keys from make_keys.py and certificates
from trustme. Everything else here connects under a role, as `dbtstream.toml` would.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import pytest
import trustme
from nats.aio.client import Client as Connection

from dbtstream.artifact_store import ArtifactStore
from dbtstream.client import Client, NoDaemon
from dbtstream.config import NatsConfig, StreamsConfig
from dbtstream.consumer import RequestConsumer
from dbtstream.embedded import find_nats_server
from dbtstream.errors import NatsRefused, NatsUnavailable
from dbtstream.events import AnyEvent, RunFinished, RunRejected, RunStarted, encode_event
from dbtstream.execution import Services
from dbtstream.kv_bucket import Bucket
from dbtstream.lineage_events import LineageDeclared
from dbtstream.lineage_store import LineageStore
from dbtstream.messages import RunView
from dbtstream.nats_auth import connect_options
from dbtstream.nats_link import NatsLink
from dbtstream.publishers.openlineage import OpenLineageSender
from dbtstream.publishers.openlineage_sinks import NatsSink
from dbtstream.publishers.stored import find_stored
from dbtstream.run_lease import Held, Leases, Vacancy
from dbtstream.schema_examples import EXAMPLES
from dbtstream.scrub import Scrubber
from dbtstream.sql_process import SqlReader
from dbtstream.statuses import RunStatus
from dbtstream.store import NodeStates, Store
from dbtstream.streams import (
    ARTIFACTS_BUCKET,
    LEASES_BUCKET,
    check_streams,
    ensure_streams,
    wanted_streams,
)
from dbtstream.stuck_requests import StuckRequests
from dbtstream.subjects import (
    CONTROL_CANCEL,
    EVENTS_STREAM,
    H_RUN_ID,
    LINEAGE_BUCKET,
    declared_key,
    event_headers,
    event_subject,
    new_run_id,
)
from tests.daemons import Served, daemon_config, serving
from tests.guarantees import check_run
from tests.openlineage_events import RunStory
from tests.scripted_child import GOOD_RUN
from tests.stories import Story

DEPLOY = Path(__file__).parents[2] / "deploy" / "nats"
NATS_SERVER = find_nats_server()

ADMIN, WORKER, SUBMITTER, VIEWER = "admin", "worker", "submitter", "viewer"
SHOP_SUBMITTER, SHOP_VIEWER = "shop_submitter", "shop_viewer"
ROLES = (ADMIN, WORKER, SUBMITTER, VIEWER, SHOP_SUBMITTER, SHOP_VIEWER)

ALL = set(ROLES)
EVERY_READER = ALL - {WORKER}
READERS_OF_ALL = {ADMIN, SUBMITTER, VIEWER}
REQUESTERS = {ADMIN, SUBMITTER}

# Who may. Everybody else may not: each role is tried on each subject.
PUBLISH: dict[str, set[str]] = {
    # requests
    "dbt.runs.shop.prod": {ADMIN, WORKER, SUBMITTER, SHOP_SUBMITTER},
    "dbt.runs.crm.prod": {ADMIN, WORKER, SUBMITTER},
    "dbt.runs.shop": {ADMIN},
    "dbt.runs.shop.prod.x": {ADMIN},
    # control
    "dbt.control.submit": REQUESTERS,
    "dbt.control.cancel": REQUESTERS,
    "dbt.control.get": REQUESTERS,
    "dbt.control.list": REQUESTERS | {WORKER},
    "dbt.control.worker.cancel": {ADMIN, WORKER},
    "dbt.control.worker.owns": {ADMIN, WORKER},
    "dbt.control.worker.status": REQUESTERS | {WORKER},
    "dbt.control.anything": {ADMIN},
    "$SRV.PING": {ADMIN},
    "$SRV.INFO.dbtstream": {ADMIN},
    # what only a worker writes
    "dbt.events.shop.prod.run.build._.success": {ADMIN, WORKER},
    "dbt.events.crm.prod.node.model.orders.error": {ADMIN, WORKER},
    "dbt.dead.shop.prod": {ADMIN, WORKER},
    "$KV.dbt_state.run.x": {ADMIN, WORKER},
    "$KV.dbt_lineage.graph.shop.prod": {ADMIN, WORKER},
    "$KV.dbt_leases.run.shop.prod": {ADMIN, WORKER},
    "$KV.dbt_leases.limit.warehouse.0": {ADMIN, WORKER},
    "$O.dbt_artifacts.C.x": {ADMIN, WORKER},
    "$O.dbt_artifacts.M.x": {ADMIN, WORKER},
    # what only the server writes
    "dbt.live.shop.prod.run.build._.success": {ADMIN},
    "dbt.other": {ADMIN},
    "$KV.other.key": {ADMIN},
    # answers to others
    "_INBOX.worker.x": {ADMIN, WORKER},
    "_INBOX.submitter.x": {ADMIN, WORKER},
    "_R_.x.y": {ADMIN, WORKER},
    # the queue
    "$JS.API.CONSUMER.DURABLE.CREATE.DBT_RUNS.k_x": {ADMIN},
    "$JS.API.CONSUMER.CREATE.DBT_RUNS.unknown_k_x.dbt.runs.shop.prod": {ADMIN, WORKER},
    "$JS.API.CONSUMER.CREATE.DBT_RUNS.x": {ADMIN},
    "$JS.API.CONSUMER.CREATE.DBT_RUNS": {ADMIN},
    "$JS.API.CONSUMER.INFO.DBT_RUNS.k_x": {ADMIN, WORKER},
    "$JS.API.CONSUMER.MSG.NEXT.DBT_RUNS.k_x": {ADMIN, WORKER},
    "$JS.API.CONSUMER.DELETE.DBT_RUNS.k_x": {ADMIN, WORKER},
    "$JS.API.CONSUMER.PAUSE.DBT_RUNS.k_x": {ADMIN},
    "$JS.API.STREAM.MSG.DELETE.DBT_RUNS": {ADMIN, WORKER},
    "$JS.API.STREAM.MSG.GET.DBT_RUNS": {ADMIN, WORKER},
    "$JS.API.DIRECT.GET.DBT_RUNS.dbt.runs.shop.prod": {ADMIN},
    "$JS.ACK.DBT_RUNS.k_x.1.1.1.1.0": {ADMIN, WORKER},
    # requests that were handed out too often
    "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.DBT_RUNS.k_x": {ADMIN},
    "$JS.API.CONSUMER.CREATE.DBT_ADVISORIES.stuck_requests": {ADMIN, WORKER},
    "$JS.API.CONSUMER.CREATE.DBT_ADVISORIES.x": {ADMIN},
    "$JS.API.CONSUMER.MSG.NEXT.DBT_ADVISORIES.stuck_requests": {ADMIN, WORKER},
    "$JS.ACK.DBT_ADVISORIES.stuck_requests.1.1.1.1.0": {ADMIN, WORKER},
    "$JS.API.CONSUMER.DELETE.DBT_ADVISORIES.stuck_requests": {ADMIN},
    # stored events
    "$JS.API.CONSUMER.CREATE.DBT_EVENTS.x.dbt.events.shop.>": ALL,
    "$JS.API.CONSUMER.CREATE.DBT_EVENTS.x.dbt.events.shop.*.*.*.*.*": ALL,
    "$JS.API.CONSUMER.CREATE.DBT_EVENTS.x.dbt.events.crm.>": READERS_OF_ALL | {WORKER},
    "$JS.API.CONSUMER.CREATE.DBT_EVENTS.x.dbt.events.*.prod.>": READERS_OF_ALL | {WORKER},
    "$JS.API.CONSUMER.CREATE.DBT_EVENTS.x.dbt.events.>": READERS_OF_ALL | {WORKER},
    "$JS.API.CONSUMER.CREATE.DBT_EVENTS.x.>": READERS_OF_ALL,
    "$JS.API.CONSUMER.CREATE.DBT_EVENTS.x": READERS_OF_ALL | {WORKER},
    "$JS.API.CONSUMER.CREATE.DBT_EVENTS": {ADMIN},
    "$JS.API.CONSUMER.DURABLE.CREATE.DBT_EVENTS.x": {ADMIN},
    "dbt.jetstream.CREATE.DBT_RUNS.x.dbt.runs.shop.prod": {ADMIN},
    "dbt.jetstream.MSG.NEXT.DBT_RUNS.k_x": {ADMIN},
    "dbt.jetstream.STREAM.PURGE.DBT_EVENTS": {ADMIN},
    "$JS.API.CONSUMER.MSG.NEXT.DBT_EVENTS.x": ALL,
    "$JS.API.CONSUMER.DELETE.DBT_EVENTS.x": ALL,
    # Consumers have random names: who does not learn one cannot pull from it.
    "$JS.API.CONSUMER.NAMES.DBT_EVENTS": {ADMIN},
    "$JS.API.CONSUMER.LIST.DBT_EVENTS": {ADMIN},
    "$JS.API.CONSUMER.INFO.DBT_EVENTS.x": {ADMIN, WORKER},
    "$JS.API.STREAM.MSG.GET.DBT_EVENTS": {ADMIN, WORKER},
    "$JS.API.DIRECT.GET.DBT_EVENTS": {ADMIN},
    "$JS.API.DIRECT.GET.DBT_EVENTS.dbt.events.shop.prod.run.build._.success": {ADMIN},
    "$JS.ACK.DBT_EVENTS.x.1.1.1.1.0": {ADMIN, WORKER},
    "openlineage.events": {ADMIN, WORKER},
    # dead letters, state, leases
    "$JS.API.CONSUMER.CREATE.DBT_DEAD.x.dbt.dead.>": {ADMIN},
    "$JS.API.STREAM.MSG.GET.DBT_DEAD": {ADMIN},
    "$JS.API.STREAM.MSG.DELETE.DBT_DEAD": {ADMIN},
    "$JS.API.STREAM.MSG.GET.KV_dbt_state": {ADMIN, WORKER},
    "$JS.API.STREAM.MSG.GET.KV_dbt_leases": {ADMIN, WORKER},
    "$JS.API.DIRECT.GET.KV_dbt_state": {ADMIN, WORKER},
    "$JS.API.STREAM.MSG.GET.KV_dbt_lineage": {ADMIN, WORKER},
    "$JS.API.DIRECT.GET.KV_dbt_lineage": READERS_OF_ALL | {WORKER},
    "$JS.API.CONSUMER.CREATE.KV_dbt_state.x.$KV.dbt_state.>": {ADMIN},
    # artifacts
    "$JS.API.STREAM.MSG.GET.OBJ_dbt_artifacts": {ADMIN, WORKER},
    "$JS.API.DIRECT.GET.OBJ_dbt_artifacts": {ADMIN, WORKER},
    "$JS.API.CONSUMER.CREATE.OBJ_dbt_artifacts": {ADMIN},
    "$JS.API.CONSUMER.CREATE.OBJ_dbt_artifacts.x.$O.dbt_artifacts.M.>": {ADMIN},
    "$O.dbt_artifacts.X.x": {ADMIN},
    "$O.other.M.x": {ADMIN},
    # streams
    "$JS.API.INFO": {ADMIN, WORKER},
    "$JS.API.STREAM.NAMES": {ADMIN},
    "$JS.API.STREAM.LIST": {ADMIN},
    "$JS.API.STREAM.CREATE.OTHER": {ADMIN},
    "$JS.API.STREAM.INFO.OTHER": {ADMIN},
    "$JS.API.STREAM.SNAPSHOT.DBT_EVENTS": {ADMIN},
    "$JS.API.STREAM.MSG.DELETE.DBT_EVENTS": {ADMIN},
    **{
        f"$JS.API.STREAM.{verb}.{stream.name}": may
        for stream in wanted_streams(StreamsConfig())
        for verb, may in {
            "INFO": {ADMIN, WORKER},
            "CREATE": {ADMIN},
            "UPDATE": {ADMIN},
            "PURGE": {ADMIN},
            "DELETE": {ADMIN},
        }.items()
    },
    "$JS.API.STREAM.PURGE.OBJ_dbt_artifacts": {ADMIN, WORKER},
    "$JS.API.STREAM.INFO.KV_dbt_lineage": READERS_OF_ALL | {WORKER},
}

SUBSCRIBE: dict[str, set[str]] = {
    **{f"_INBOX.{role}.>": {ADMIN, role} for role in ROLES},
    "_INBOX.>": {ADMIN},
    "_INBOX.*.x": {ADMIN},
    ">": {ADMIN},
    "*.>": {ADMIN},
    "dbt.>": {ADMIN},
    "dbt.live.shop.>": EVERY_READER,
    "dbt.live.shop.*.node.model.*.error": EVERY_READER,
    "dbt.live.crm.>": READERS_OF_ALL,
    "dbt.live.>": READERS_OF_ALL,
    "dbt.live.*.prod.>": READERS_OF_ALL,
    "dbt.events.shop.>": {ADMIN},
    "dbt.runs.shop.prod": {ADMIN},
    "dbt.dead.>": {ADMIN},
    "dbt.control.submit": {ADMIN, WORKER},
    "dbt.control.worker.cancel": {ADMIN, WORKER},
    "dbt.control.worker.status": {ADMIN, WORKER},
    "$SRV.PING.dbtstream": {ADMIN, WORKER},
    "$KV.dbt_state.>": {ADMIN},
    "$JS.EVENT.ADVISORY.>": {ADMIN},
    "$JS.API.>": {ADMIN},
    "$JS.ACK.>": {ADMIN},
}


@dataclass(frozen=True)
class Broker:
    """A nats-server that was started from deploy/nats."""

    folder: Path
    port: int

    def config(self, role: str) -> NatsConfig:
        """What `[nats]` says in the dbtstream.toml of that role."""
        return NatsConfig(
            servers=(f"tls://127.0.0.1:{self.port}",),
            nkey_seed_file=str(self.folder / f"{role}.nk"),
            tls_ca_file=str(self.folder / "tls" / "ca.pem"),
            inbox_prefix=f"_INBOX.{role}",
            reconnect_wait_s=0.05,
        )

    @contextlib.asynccontextmanager
    async def link(self, role: str) -> AsyncIterator[NatsLink]:
        async with NatsLink(self.config(role), name=role) as link:
            await link.wait_connected(20)
            yield link

    @contextlib.asynccontextmanager
    async def client(self, role: str) -> AsyncIterator[Client]:
        async with Client.connect(config=self.config(role), name=role) as client:
            yield client


def make_certificates(folder: Path) -> None:
    """An authority of our own, and certificates for 127.0.0.1 under the names in the files."""
    folder.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    shutil.copy(folder / "ca.pem", folder / "route-ca.pem")
    for name in ("server", "route"):
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        (folder / f"{name}.pem").write_bytes(b"".join(p.bytes() for p in issued.cert_chain_pems))


def make_keys(folder: Path) -> None:
    subprocess.run(
        [sys.executable, DEPLOY / "make_keys.py", folder], check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/etc/nats as deploy/README.md has it made; made once, and copied for each test."""
    folder = tmp_path_factory.mktemp("prepared") / "nats"
    shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("__pycache__"))
    make_certificates(folder / "tls")
    make_keys(folder)
    return folder


@pytest.fixture
def etc(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "etc")


@contextlib.asynccontextmanager
async def running(folder: Path, config: str, *flags: str, name: str = "") -> AsyncIterator[int]:
    """The server on a port that it chooses; yields that."""
    ports_dir = folder / f"ports-{uuid.uuid4().hex}"
    ports_dir.mkdir()
    process = await asyncio.create_subprocess_exec(
        *(NATS_SERVER, "-c", config, "-a", "127.0.0.1", "-p", "-1", "-m", "-1"),
        *("--ports_file_dir", str(ports_dir), "-l", str(ports_dir / "log"), *flags),
        cwd=folder,
        env={**os.environ, "NATS_NAME": name},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(30):
            while not (files := [*ports_dir.glob("*.ports")]) or not files[0].read_bytes():
                assert process.returncode is None, (ports_dir / "log").read_text()
                await asyncio.sleep(0.01)  # there is nothing to wait on but the file system
        yield int(json.loads(files[0].read_bytes())["nats"][0].rpartition(":")[2])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.fixture
async def broker(etc: Path) -> AsyncIterator[Broker]:
    """single.conf, with the streams that `dbtstream setup` makes under the role admin."""
    async with running(etc, "single.conf") as port:
        broker = Broker(etc, port)
        async with broker.link(ADMIN) as link:
            await ensure_streams(link, StreamsConfig())
        yield broker


@dataclass
class Tried:
    """A connection under a role that hears what the server denies it."""

    connection: Connection
    said: list[str] = field(default_factory=list)

    @classmethod
    @contextlib.asynccontextmanager
    async def connect(cls, config: NatsConfig) -> "AsyncIterator[Tried]":
        tried = cls(Connection())
        options = await asyncio.to_thread(connect_options, config, "test")

        async def hear(error: Exception) -> None:
            tried.said.append(str(error))

        await tried.connection.connect(**options, error_cb=hear)
        try:
            yield tried
        finally:
            await tried.connection.close()

    async def publish(self, subject: str, payload: bytes = b"", reply: str = "") -> bool:
        """Whether it may. JetStream ignores a request without a reply subject: no harm done."""
        self.said.clear()
        await self.connection.publish(subject, payload, reply=reply)
        await self.settled()
        assert not self.said or "permissions violation for publish" in self.said[0].lower()
        return not self.said

    async def subscribe(self, subject: str) -> bool:
        self.said.clear()
        subscription = await self.connection.subscribe(subject)
        await self.settled()
        denied = list(self.said)
        await subscription.unsubscribe()
        assert not denied or "permissions violation for subscription" in denied[0].lower()
        return not denied

    async def settled(self) -> None:
        """An -ERR comes before the PONG. Twice: nats-py's PING overtakes what it has buffered."""
        await self.connection.flush(10)
        await self.connection.flush(10)


# -- the files -------------------------------------------------------------------------------


CONFIGS = ["single.conf", "cluster.conf", "roles.conf", "private.conf"]


@pytest.mark.parametrize("config", CONFIGS)
def test_nats_server_takes_the_file(etc: Path, config: str) -> None:
    checked = subprocess.run(
        [NATS_SERVER, "-t", "-c", config],
        cwd=etc,
        env={**os.environ, "NATS_NAME": "nats-1"},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr


def test_every_conf_file_is_tried() -> None:
    assert {path.name for path in DEPLOY.glob("*.conf")} == set(CONFIGS)


def allowed_in_file(role: str, verb: str) -> list[str]:
    """The strings of `<ROLE>: { … <verb>: { allow: [ … ] } }` in roles.conf."""
    text = re.sub(r"(?m)^\s*#.*$", "", (DEPLOY / "roles.conf").read_text())
    block = text.partition(f"\n{role.upper()}: {{")[2].partition("\n}\n")[0]
    return re.findall(r'"([^"]+)"', block.partition(f"{verb}:")[2].partition("]")[0])


def covers(pattern: str, subject: str) -> bool:
    wanted, got = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        wanted, got = wanted[:-1], got[: len(wanted) - 1] if len(got) >= len(wanted) else []
    return len(wanted) == len(got) and all(w in ("*", g) for w, g in zip(wanted, got, strict=True))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("verb", "table"), [("publish", PUBLISH), ("subscribe", SUBSCRIBE)])
def test_every_permission_in_the_file_is_tried(
    role: str, verb: str, table: dict[str, set[str]]
) -> None:
    permissions = allowed_in_file(role, verb)
    assert permissions
    tried = [subject for subject, may in table.items() if role in may]
    # As the mappings of the clients' accounts have it.
    for prefix in ("$JS.API.CONSUMER.", "$JS.API."):
        tried += [subject.replace(prefix, "dbt.jetstream.") for subject in tried]
    assert [p for p in permissions if not any(covers(p, s) for s in tried)] == []


def test_making_keys_again_changes_none_and_seeds_are_their_owners_only(etc: Path) -> None:
    """Also when the seeds have gone to their clients; a new role gets its key."""
    before = (etc / "keys.conf").read_text()
    seeds = sorted(etc.glob("*.nk"))
    assert [seed.stem for seed in seeds] == sorted(ROLES)
    assert {seed.stat().st_mode & 0o777 for seed in seeds} == {0o600}
    for seed in seeds:
        seed.unlink()
    roles = etc / "roles.conf"
    roles.write_text(roles.read_text() + "\n# x: $KEY_COMMENTED\nx: $KEY_CRM_VIEWER\n")
    make_keys(etc)
    assert (etc / "keys.conf").read_text().startswith(before)
    assert [seed.name for seed in etc.glob("*.nk")] == ["crm_viewer.nk"]


# -- who may what ----------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_may_do_what_the_table_says_and_nothing_else_in_it(
    broker: Broker, role: str
) -> None:
    async with Tried.connect(broker.config(role)) as tried:
        published = {subject: await tried.publish(subject) for subject in PUBLISH}
        subscribed = {subject: await tried.subscribe(subject) for subject in SUBSCRIBE}
    assert published == {subject: role in may for subject, may in PUBLISH.items()}
    assert subscribed == {subject: role in may for subject, may in SUBSCRIBE.items()}


async def test_nobody_gets_in_without_a_key_or_without_tls(broker: Broker) -> None:
    admin = await asyncio.to_thread(connect_options, broker.config(ADMIN), "test")
    no_key = {key: value for key, value in admin.items() if key != "nkeys_seed_str"}
    no_tls = {key: value for key, value in admin.items() if key != "tls"}
    other = broker.folder / "other"
    other.mkdir()
    (other / "roles.conf").write_text("x: $KEY_STRANGER\n")
    make_keys(other)
    stranger = admin | {"nkeys_seed_str": (other / "stranger.nk").read_text().strip()}

    async def refused(**options: Any) -> str:
        said: list[str] = []

        async def hear(error: Exception) -> None:
            said.append(str(error))

        with pytest.raises((nats.errors.Error, ssl.SSLError)) as raised:
            await Connection().connect(**options, allow_reconnect=False, error_cb=hear)
        return " ".join((str(raised.value), *said)).lower()

    assert "authorization violation" in await refused(**no_key)
    assert "authorization violation" in await refused(**stranger)
    assert "certificate verify failed" in await refused(**no_tls)


# -- reading events --------------------------------------------------------------------------


async def store_events(broker: Broker, *projects: str) -> None:
    """The beginning of a run of each, as a worker stores it."""
    async with broker.link(WORKER) as link:
        for project in projects:
            story = Story(project=project, run_id=new_run_id(datetime.now(UTC))).hello()
            for event in story.events:
                await link.publish(event_subject(event), encode_event(event), event_headers(event))


async def projects_read(client: Client, **selection: Any) -> set[str]:
    """Whose events are stored, as far as this client may know."""
    async with asyncio.timeout(30), client.events(since="all", follow=False, **selection) as events:
        return {event.project async for event in events}


@pytest.mark.parametrize("role", [SUBMITTER, VIEWER])
async def test_who_reads_all_projects_reads_each(broker: Broker, role: str) -> None:
    await store_events(broker, "shop", "crm")
    async with broker.client(role) as client:
        assert await projects_read(client) == {"shop", "crm"}
        assert await projects_read(client, project="crm") == {"crm"}
        assert await projects_read(client, family={"run", "node"}) == {"shop", "crm"}


@pytest.mark.parametrize("role", [SHOP_SUBMITTER, SHOP_VIEWER])
async def test_who_reads_one_project_gets_it_and_is_told_no_for_another(
    broker: Broker, role: str
) -> None:
    await store_events(broker, "shop", "crm")
    async with broker.client(role) as client:
        assert await projects_read(client, project="shop") == {"shop"}
        assert await projects_read(client, project="shop", target="prod", family="run") == {"shop"}
        # Several words are several filters, which do not fit into the subject of the request.
        assert await projects_read(client, project="shop", family={"run", "node"}) == {"shop"}
        assert await projects_read(client, project="shop", family={"log", "node"}) == set()
        for selection in ({"project": "crm"}, {"project": {"shop", "crm"}}, {}):
            with pytest.raises(NatsRefused, match=r"(?i)permissions violation"):
                await projects_read(client, **selection)


async def test_who_reads_all_projects_reads_their_lineage_and_others_do_not(
    broker: Broker,
) -> None:
    """One bucket has all projects, and a request to it cannot be held to one."""
    declared = EXAMPLES["event.lineage.declared"]
    assert isinstance(declared, LineageDeclared)
    async with broker.link(WORKER) as worker:
        bucket = Bucket(worker, LINEAGE_BUCKET, retry_for_s=0)
        key = declared_key(declared.project, declared.target, declared.unique_id)
        await bucket.write(key, encode_event(declared), None)
    for role in (ADMIN, SUBMITTER, VIEWER):
        async with broker.client(role) as client:
            graph = await client.lineage(declared.project)
            assert declared.unique_id in graph.nodes, role
    for role in (SHOP_SUBMITTER, SHOP_VIEWER):
        async with broker.client(role) as client:
            with pytest.raises(NatsRefused, match=r"(?i)permissions violation"):
                await client.lineage(declared.project)


async def test_a_viewer_of_one_project_sees_it_live(broker: Broker) -> None:
    async with Tried.connect(broker.config(SHOP_VIEWER)) as viewer:
        live = await viewer.connection.subscribe("dbt.live.shop.>")
        await viewer.settled()
        await store_events(broker, "crm", "shop")
        message = await live.next_msg(timeout=30)
    assert message.subject.startswith("dbt.live.shop.prod.run.")


@pytest.mark.parametrize(
    ("path", "filters"),
    [
        ("x.dbt.events.shop.>", {"filter_subject": "dbt.events.crm.>"}),
        ("x.dbt.events.shop.>", {"filter_subject": "dbt.events.>"}),
        ("x.dbt.events.shop.>", {"filter_subject": ""}),
        ("x.dbt.events.shop.>", {}),
        ("x.dbt.events.shop.>", {"filter_subjects": ["dbt.events.shop.>", "dbt.events.crm.>"]}),
        ("x.dbt.events.shop.>", {"filter_subjects": ["dbt.events.crm.>"]}),
    ],
)
async def test_the_body_of_a_consumer_cannot_say_another_filter_than_its_subject(
    broker: Broker, path: str, filters: dict[str, Any]
) -> None:
    config = {"name": "x", "ack_policy": "none", **filters}
    async with broker.link(SHOP_VIEWER) as link:
        answer = await api(link, f"CONSUMER.CREATE.{EVENTS_STREAM}.{path}", config)
    assert "error" in answer, answer


async def api(link: NatsLink, path: str, config: dict[str, Any]) -> dict[str, Any]:
    body = {"stream_name": EVENTS_STREAM, "config": config}
    answer = await link.request(f"$JS.API.{path}", json.dumps(body).encode())
    decoded: dict[str, Any] = json.loads(answer.data)
    return decoded


async def test_a_viewer_of_another_project_is_made_as_the_file_says(etc: Path) -> None:
    """By repeating what is named shop with another name."""
    roles = etc / "roles.conf"
    text = roles.read_text()
    blocks = [m[0] for m in re.finditer(r"(?ms)^( *)SHOP\w*: \{.*?^\1\}\n", text)]
    assert len(blocks) == 3
    for block in blocks:
        text = text.replace(block, block + block.replace("shop", "crm").replace("SHOP", "CRM"))
    roles.write_text(text)
    make_keys(etc)
    async with running(etc, "single.conf") as port:
        broker = Broker(etc, port)
        async with broker.link(ADMIN) as link:
            await ensure_streams(link, StreamsConfig())
        await store_events(broker, "shop", "crm")
        async with broker.client("crm_viewer") as client:
            assert await projects_read(client, project="crm") == {"crm"}
            with pytest.raises(NatsRefused, match=r"(?i)permissions violation"):
                await projects_read(client, project="shop")


# -- a daemon --------------------------------------------------------------------------------

GATED = """
    words = start_line()["args"]
    hello()
    plan(model("orders"))
    started("orders")
    wait_for(sys.argv[0] + "-go")
    finished("orders")
    result(0, [("orders", "success")])
"""
"""dbt that waits for the test, and for no line of control."""


@contextlib.asynccontextmanager
async def daemon_of(
    broker: Broker, folder: Path, body: str, *, manage: bool = False, name: str = "tester"
) -> AsyncIterator[Served]:
    """Under the role worker."""
    config = daemon_config(
        folder, broker.config(WORKER), body, lease_ttl_s=3, heartbeat_s=1.0, name=name
    )
    streams = msgspec.structs.replace(config.streams, manage=manage)
    async with serving(msgspec.structs.replace(config, streams=streams)) as served:
        yield served


@pytest.fixture
def nothing_denied(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every link of ours logs what the server denies it."""
    caplog.set_level(logging.WARNING, "dbtstream")
    yield
    problems = [r for r in caplog.get_records("call") if r.name == "dbtstream.nats_connection"]
    assert [vars(record) for record in problems] == []


async def ends(client: Client, count: int, **selection: Any) -> list[RunFinished | RunRejected]:
    """The first `count` ends of runs that are stored, waiting for them."""
    found: list[RunFinished | RunRejected] = []
    async with asyncio.timeout(60), client.events(family="run", since="all", **selection) as events:
        async for event in events:
            if isinstance(event, RunFinished | RunRejected):
                found.append(event)
                if len(found) == count:
                    break
    return found


@pytest.mark.usefixtures("nothing_denied")
async def test_a_run_from_submitter_to_worker_to_viewer(broker: Broker, tmp_path: Path) -> None:
    """Submitted through control and as a plain message; nobody needs more than its role."""
    async with daemon_of(broker, tmp_path, GOOD_RUN) as served:
        async with broker.client(SUBMITTER) as submitter:
            accepted = await submitter.submit("shop", ["build"], target="prod")
            finished = await submitter.wait(accepted.run_id, timeout_s=60)
            assert finished.status is RunStatus.SUCCESS
            assert (await submitter.get(accepted.run_id)).run_id == accepted.run_id
        async with broker.link(SHOP_SUBMITTER) as loader:
            await loader.publish("dbt.runs.shop.prod", b'{"args":["build"]}')
        for role in (SHOP_SUBMITTER, SHOP_VIEWER):
            async with broker.client(role) as viewer:
                first, second = await ends(viewer, 2, project="shop")
                assert first == finished
                assert isinstance(second, RunFinished)
                async with viewer.events(project="shop", run_id=second.run_id) as events:
                    check_run([event async for event in events])
        await served.queue_empty()
        async with broker.client(SUBMITTER) as submitter:
            assert {run.run_id for run in (await submitter.list()).runs} == {
                first.run_id,
                second.run_id,
            }


@pytest.mark.usefixtures("nothing_denied")
async def test_a_submitter_hears_from_every_worker_and_what_they_do(
    broker: Broker, tmp_path: Path, until: Callable[[Callable[[], object]], Awaitable[None]]
) -> None:
    """From its own account: one question, several answers."""
    heard: list[AnyEvent] = []
    names = ("etl-1", "etl-2", "etl-3")
    async with contextlib.AsyncExitStack() as workers:
        for name in names:
            (tmp_path / name).mkdir()
            await workers.enter_async_context(
                daemon_of(broker, tmp_path / name, GOOD_RUN, name=name)
            )
        async with broker.client(SUBMITTER) as submitter, submitter.live(heard.append):
            assert tuple(status.worker for status in await submitter.workers()) == names
            await submitter.submit("shop", ["build"], target="prod")
            await until(lambda: any(isinstance(event, RunFinished) for event in heard))


@pytest.mark.parametrize("role", [VIEWER, SHOP_SUBMITTER, SHOP_VIEWER])
async def test_who_may_not_ask_control_may_not_ask_workers(broker: Broker, role: str) -> None:
    async with broker.client(role) as client:
        with pytest.raises(NatsRefused, match=r"(?i)permissions violation"):
            await client.workers()


@pytest.mark.usefixtures("nothing_denied")
async def test_a_worker_may_cancel_reject_and_close_a_lost_run(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a daemon does beside running dbt, with nothing denied to it."""
    monkeypatch.setattr("dbtstream.unknown_subjects.GRACE_S", 0.0)
    at = datetime.now(UTC)
    story = Story(project="shop", target="dev", run_id=new_run_id(at)).hello()
    lost = RunView(
        run_id=story.events[0].run_id,
        project="shop",
        target="dev",
        status=RunStatus.RUNNING,
        attempt=1,
        worker="vanished",
        request_seq=5,  # the fifth request below
        queued_at=at - timedelta(days=365),
    )
    async with (
        daemon_of(broker, tmp_path, GATED) as served,
        broker.client(SUBMITTER) as submitter,
        broker.link(SUBMITTER) as queue,
        broker.link(WORKER) as worker,
    ):
        running, waiting = [
            await submitter.submit("shop", ["build"], target="prod") for _ in range(2)
        ]
        async with asyncio.timeout(30):
            async for event in submitter.events(run_id=running.run_id):
                if isinstance(event, RunStarted):
                    break
        await submitter.cancel(waiting.run_id)
        await submitter.cancel(running.run_id)
        await queue.publish("dbt.runs.shop.prod", b"no json")
        await queue.publish("dbt.runs.crm.prod", b'{"args":["build"]}')
        await Store(worker).create_run(lost)
        for event in story.events:
            await worker.publish(event_subject(event), encode_event(event), event_headers(event))
        await queue.publish(
            "dbt.runs.shop.dev", b'{"args":["build"],"on_lost":"fail"}', {H_RUN_ID: lost.run_id}
        )

        found = await ends(submitter, 5)
        stored = await find_stored(
            worker, event_subject(story.events[0]), lost.run_id, at.timestamp()
        )
        await served.queue_empty()

    assert sorted(
        (end.project, end.target, end.status if isinstance(end, RunFinished) else end.code)
        for end in found
    ) == [
        ("crm", "prod", "unknown_project"),
        ("shop", "dev", "lost"),
        ("shop", "prod", "bad_message"),
        ("shop", "prod", "cancelled"),
        ("shop", "prod", "cancelled"),
    ]
    assert {event.event_id for event in story.events} < stored


@pytest.mark.usefixtures("nothing_denied")
async def test_a_worker_may_take_out_a_request_that_was_handed_out_too_often(
    broker: Broker, tmp_path: Path
) -> None:
    config = daemon_config(tmp_path, broker.config(WORKER), GOOD_RUN, max_deliveries=1)

    async def not_begun(*_: object) -> bool:
        raise AssertionError("no run of it has begun")

    async with broker.link(WORKER) as worker, broker.link(SUBMITTER) as queue:
        store = Store(worker)
        services = Services(
            config,
            worker,
            store,
            NodeStates(store),
            ArtifactStore(worker),
            LineageStore(worker),
            SqlReader(),
        )
        consumer = RequestConsumer(worker, config, "dbt.runs.shop.prod")
        await queue.publish("dbt.runs.shop.prod", b'{"args":["build"]}')
        lease = await consumer.next()
        assert lease is not None
        await lease.give_back()
        stuck = StuckRequests(worker, services, not_begun)
        asking = asyncio.create_task(consumer.next())
        async with asyncio.timeout(30):
            while await stuck.sweep() != ["deliveries_exhausted"]:
                pass
        asking.cancel()
        await asyncio.wait({asking})
        await consumer.close()


async def test_a_worker_uses_the_streams_and_does_not_make_them(
    broker: Broker, tmp_path: Path
) -> None:
    async with broker.link(ADMIN) as admin:
        await admin.js.delete_stream("DBT_DEAD")
    async with broker.link(WORKER) as worker:
        assert await check_streams(worker, StreamsConfig()) == [
            "stream DBT_DEAD is missing (`dbtstream setup` creates it)"
        ]
        with pytest.raises(NatsRefused, match=r"(?i)permissions violation.*stream\.create"):
            await ensure_streams(worker, StreamsConfig())
    with pytest.raises(NatsRefused, match=r"DBT_DEAD is missing \(`dbtstream setup`"):
        async with daemon_of(broker, tmp_path, GOOD_RUN):
            pass


async def test_a_worker_takes_keeps_and_gives_up_leases(broker: Broker) -> None:
    async with broker.link(WORKER) as worker:
        leases = Leases(worker, worker="w1", ttl_s=120, renew_s=15)
        lease = await leases.acquire_target("shop", "prod", "r1")
        assert lease is not None
        async with lease:
            assert await lease.take_limits({"warehouse": 4})
            assert await lease.confirm()
            assert await leases.holder("shop", "prod") == Held(
                worker="w1", run_id="r1", token=lease.token
            )
        assert await leases.vacancy("shop", "prod") is Vacancy.GIVEN_UP


async def test_a_worker_sends_events_on_as_openlineage(
    broker: Broker, until: Callable[[Callable[[], object]], Awaitable[None]]
) -> None:
    """To a stream that an admin has made."""
    async with broker.link(ADMIN) as admin:
        await admin.js.add_stream(name="OPENLINEAGE", subjects=["openlineage.events"])
    async with broker.link(WORKER) as worker, asyncio.timeout(30):
        sender = OpenLineageSender(
            worker, NatsSink(worker, "openlineage.events"), namespace="dbt", worker="w1"
        )
        sending = asyncio.create_task(sender.run())
        await until(lambda: sender.feed.ready)
        for event in RunStory().begin().build("model.shop.orders").end().events:
            await worker.publish(event_subject(event), encode_event(event), event_headers(event))
        await until(lambda: sender.stats.sent == 4)
        sending.cancel()
        await asyncio.wait({sending})


@pytest.mark.parametrize("role", [SUBMITTER, VIEWER, SHOP_SUBMITTER, SHOP_VIEWER])
async def test_only_a_worker_can_lease_or_see_who_does(broker: Broker, role: str) -> None:
    async with broker.link(role) as link:
        bucket = Bucket(link, LEASES_BUCKET, retry_for_s=0)
        for call in (bucket.write("run.shop.prod", b"x", None), bucket.read("run.shop.prod")):
            with pytest.raises(NatsRefused, match=r"(?i)permissions violation"):
                await call


async def test_a_worker_stores_replaces_fetches_and_deletes_artifacts(
    broker: Broker, tmp_path: Path
) -> None:
    run_id = new_run_id(datetime.now(UTC))
    file, into = tmp_path / "manifest.json", tmp_path / "state"
    async with broker.link(WORKER) as worker:
        store = ArtifactStore(worker)
        for text in ("one", "two"):
            file.write_text(text)
            names = await store.put_run(run_id, {"manifest": file}, Scrubber())
            assert names == {"manifest": f"{run_id}/manifest.json"}
            assert await store.fetch(run_id, ["manifest.json"], into) == ["manifest.json"]
            assert (into / "manifest.json").read_text() == text
        bucket = await worker.js.object_store(ARTIFACTS_BUCKET)
        assert (await bucket.status()).stream_info.state.messages == 2  # of the second one only
        await bucket.delete(names["manifest"])
        assert await store.fetch(run_id, ["manifest.json"], into) == []


@pytest.mark.parametrize("role", [SUBMITTER, VIEWER, SHOP_SUBMITTER, SHOP_VIEWER])
async def test_only_a_worker_can_store_or_fetch_artifacts(
    broker: Broker, role: str, tmp_path: Path
) -> None:
    run_id = new_run_id(datetime.now(UTC))
    (tmp_path / "manifest.json").write_text("{}")
    async with broker.link(role) as link:
        store = ArtifactStore(link)
        files = {"manifest": tmp_path / "manifest.json"}
        assert await store.put_run(run_id, files, Scrubber()) == {}
        assert store.stats.failed == 1
        with pytest.raises(NatsRefused, match=r"(?i)permissions violation"):
            await store.fetch(run_id, ["manifest.json"], tmp_path / "state")


# -- what the permissions cannot stop --------------------------------------------------------


async def test_control_does_not_act_on_what_a_consumer_delivers_to_it(
    broker: Broker, tmp_path: Path
) -> None:
    """Who may make a consumer may have it deliver to any subject, here one of control's.

    The event is as bad as can be: a valid cancel request. The order of what control handles
    is known from a true cancel of another run, which goes over both of the subjects.
    """
    async with daemon_of(broker, tmp_path, GATED) as served, broker.client(SUBMITTER) as client:
        victim = await client.submit("shop", ["build"], target="prod")
        other = await client.submit("shop", ["build"], target="dev")
        for run in (victim, other):
            async with asyncio.timeout(30):
                async for event in client.events(run_id=run.run_id):
                    if isinstance(event, RunStarted):
                        break
        subject = "dbt.events.shop.forged.x.x.x.x"
        await served.publish(subject, json.dumps({"run_id": victim.run_id}).encode())

        async with (
            broker.link(ADMIN) as admin,
            broker.link(SHOP_VIEWER) as viewer,
        ):
            for name, target in (("one", "dbt.control.cancel"), ("two", CONTROL_CANCEL)):
                heard = await admin.client.subscribe(target)
                await admin.client.flush()
                config = {
                    "name": name,
                    "filter_subject": subject,
                    "deliver_subject": target,
                    "ack_policy": "none",
                }
                path = f"CONSUMER.CREATE.{EVENTS_STREAM}.{name}.{subject}"
                assert "error" not in await api(viewer, path, config)
                message = await heard.next_msg(timeout=30)
                assert (message.subject, message.reply[:8]) == (subject, "$JS.ACK.")
                await heard.unsubscribe()

        await client.cancel(other.run_id)
        assert (await client.wait(other.run_id, timeout_s=60)).status is RunStatus.CANCELLED
        (tmp_path / "child-go").touch()
        assert (await client.wait(victim.run_id, timeout_s=60)).status is RunStatus.SUCCESS


async def test_control_answers_to_no_subject_but_an_inbox(broker: Broker, tmp_path: Path) -> None:
    """A request names where its answer goes, and the worker that answers may publish there."""
    replies = (
        "dbt.events.shop.prod.run.build._.success",
        "dbt.live.shop.prod.run.build._.success",
        "dbt.runs.crm.prod",
        "dbt.dead.shop.prod",
        "dbt.control.worker.cancel",
        "$KV.dbt_state.run.x",
        "$JS.API.STREAM.MSG.DELETE.DBT_RUNS",
    )
    async with daemon_of(broker, tmp_path, GOOD_RUN), broker.link(ADMIN) as admin:
        heard = {reply: await admin.client.subscribe(reply) for reply in replies}
        await admin.client.flush()
        async with Tried.connect(broker.config(SUBMITTER)) as submitter:
            for verb in ("submit", "cancel", "get", "list", "worker.status"):
                body = b'{"run_id":"x"}' if verb in ("cancel", "get") else b"{}"
                for reply in replies:
                    assert await submitter.publish(f"dbt.control.{verb}", body, reply=reply)
                # One verb's requests are handled in their order: this one comes after those.
                await submitter.connection.request(f"dbt.control.{verb}", body, timeout=30)
        await admin.client.flush()
        answered = {reply: subscription.pending_msgs for reply, subscription in heard.items()}
    assert answered == dict.fromkeys(replies, 0)


async def test_the_server_answers_a_client_in_no_stream(broker: Broker) -> None:
    """Neither with a pulled event, nor with JetStream's own answer, nor with an ack."""
    await store_events(broker, "shop")
    before = {"dbt.events.shop.prod.run._._.started": 1}
    targets = ("dbt.runs.crm.prod", "dbt.events.crm.x.x.x.x.x", "dbt.dead.x.y", "$KV.dbt_state.x")
    streams = ("DBT_RUNS", "DBT_EVENTS", "DBT_DEAD", "KV_dbt_state")
    create = f"$JS.API.CONSUMER.CREATE.{EVENTS_STREAM}"
    pull = f"$JS.API.CONSUMER.MSG.NEXT.{EVENTS_STREAM}"
    config = {"filter_subject": "dbt.events.shop.>", "ack_policy": "none"}
    async with (
        broker.link(ADMIN) as admin,
        Tried.connect(broker.config(SHOP_SUBMITTER)) as client,
    ):
        for number, target in enumerate(targets):
            push = config | {"name": f"push{number}", "deliver_subject": target}
            for body in (config | {"name": f"pull{number}"}, push):
                request = json.dumps({"stream_name": EVENTS_STREAM, "config": body}).encode()
                path = f"{create}.{body['name']}.dbt.events.shop.>"
                await client.connection.request(path, request, timeout=30)
            assert await client.publish(f"{pull}.pull{number}", b"1", reply=target)
            assert await client.publish(f"$JS.API.CONSUMER.DELETE.{EVENTS_STREAM}.x", reply=target)
            assert await client.publish("dbt.runs.shop.prod", b"x", reply=target)
        stored: dict[str, int] = {}
        for stream in streams:
            info = await admin.js.stream_info(stream, subjects_filter=">")
            stored |= info.state.subjects or {}
    assert stored == before | {"dbt.runs.shop.prod": len(targets)}


async def test_a_client_is_told_that_no_daemon_is_there(broker: Broker) -> None:
    async with broker.client(SUBMITTER) as client:
        with pytest.raises(NoDaemon):
            await client.list()


async def test_the_server_refuses_an_ack_as_the_reply_of_a_request(broker: Broker) -> None:
    """So nobody settles another's request with the answer to his own."""
    async with Tried.connect(broker.config(SUBMITTER)) as submitter:
        assert not await submitter.publish(
            "dbt.control.get", b'{"run_id":"x"}', reply="$JS.ACK.DBT_RUNS.k_x.1.1.1.1.0"
        )
        assert "$js.ack." in submitter.said[0].lower()


# -- the command line, and three servers -----------------------------------------------------


def write_config(broker: Broker, role: str) -> Path:
    nats = broker.config(role)
    path = broker.folder / f"{role}.toml"
    path.write_text(
        f"""
[nats]
servers = ["{nats.servers[0]}"]
nkey_seed_file = "{role}.nk"
tls_ca_file = "tls/ca.pem"
inbox_prefix = "{nats.inbox_prefix}"
"""
    )
    return path


async def dbtstream(config: Path, *words: str) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of the command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from dbtstream.cli import main; main()"),
        *("--config", str(config), *words),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, problems = await process.communicate()
    return process.returncode, output.decode(), problems.decode()


async def test_the_commands_work_under_their_roles(broker: Broker, tmp_path: Path) -> None:
    code, said, problems = await dbtstream(write_config(broker, ADMIN), "setup")
    assert (code, said.count("as it should be")) == (0, len(wanted_streams(StreamsConfig())))
    submitter, viewer = write_config(broker, SUBMITTER), write_config(broker, SHOP_VIEWER)
    async with daemon_of(broker, tmp_path, GOOD_RUN):
        run = ("run", "shop", "--target", "prod", "--json", "--", "build")
        code, said, problems = await dbtstream(submitter, *run)
        assert code == 0, problems
        run_id = json.loads(said.splitlines()[-1])["run_id"]
        for words in (("ps", "--all"), ("show", "last"), ("top", "--once"), ("top", "--json")):
            code, said, problems = await dbtstream(submitter, *words)
            assert (code, run_id[-8:] in said) == (0, True), said + problems
        _, said, problems = await dbtstream(write_config(broker, WORKER), "check")
        assert "streams: all there" in said, said + problems
        assert "daemon: one answers" in said, said + problems
        admin = write_config(broker, ADMIN)
        code, said, problems = await dbtstream(admin, "verify", run_id)
        assert (code, said.startswith("agrees: ")) == (0, True), said + problems
        code, said, problems = await dbtstream(admin, "dead", "ls")
        assert (code, said) == (0, "no dead letters\n"), problems
        for words in (("dead", "ls"), ("verify", run_id)):
            code, said, problems = await dbtstream(submitter, *words)
            assert (code, said, "permissions violation" in problems.lower()) == (1, "", True)
        tail = ("tail", "--run", run_id, "--json")
        code, said, problems = await dbtstream(viewer, *tail, "--project", "shop")
        assert (code, said.count('"run.finished"')) == (0, 1), problems
        code, said, problems = await dbtstream(viewer, *tail)
        assert (code != 0, said) == (True, "")
        assert "permissions violation" in problems.lower()


async def test_the_roles_hold_on_three_servers(etc: Path, tmp_path: Path) -> None:
    """cluster.conf, with streams of three copies."""
    with contextlib.ExitStack() as sockets:
        taken = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        routes = [f"tls://127.0.0.1:{one.getsockname()[1]}" for one in taken]
    async with contextlib.AsyncExitStack() as servers:
        for number, route in enumerate(routes, start=1):
            folder = shutil.copytree(etc, tmp_path / f"nats-{number}")
            flags = ("--cluster", route, "--routes", ",".join(routes))
            port = await servers.enter_async_context(
                running(folder, "cluster.conf", *flags, name=folder.name)
            )
        broker = Broker(etc, port)
        async with broker.link(ADMIN) as admin, asyncio.timeout(60):
            while True:  # until they have chosen a leader
                try:
                    await ensure_streams(admin, StreamsConfig(replicas=3))
                    break
                except NatsUnavailable:
                    continue
            info = await admin.js.stream_info(EVENTS_STREAM)
            assert info.cluster is not None
            assert len(info.cluster.replicas or []) == 2
        async with daemon_of(broker, tmp_path, GOOD_RUN), broker.client(SUBMITTER) as client:
            accepted = await client.submit("shop", ["build"], target="prod")
            finished = await client.wait(accepted.run_id, timeout_s=60)
            assert finished.status is RunStatus.SUCCESS
        async with broker.client(SHOP_VIEWER) as viewer:
            assert await projects_read(viewer, project="shop") == {"shop"}
            with pytest.raises(NatsRefused, match=r"(?i)permissions violation"):
                await projects_read(viewer, project="crm")
