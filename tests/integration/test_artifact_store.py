"""dbt's artifacts in a real Object Store: kept, replaced, fetched, through outages and refusals.

At the end real dbt compares with, and defers to, what another run has left there.
"""

import asyncio
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from nats.js.errors import NotFoundError
from nats.js.object_store import ObjectStore

from dbtstream.artifact_store import ArtifactStore, latest_prefix
from dbtstream.artifacts import FILES, artifact_files
from dbtstream.config import (
    Config,
    NatsConfig,
    ProjectConfig,
    SecretRef,
    StreamsConfig,
    WorkerConfig,
)
from dbtstream.embedded import NatsServer
from dbtstream.errors import NatsRefused, NatsUnavailable
from dbtstream.nats_link import NatsLink
from dbtstream.object_bucket import CHUNK_BYTES, ObjectBucket
from dbtstream.scrub import Scrubber
from dbtstream.streams import ARTIFACTS_BUCKET, ensure_streams
from dbtstream.workspace import Workspace, prepare_workspace
from tests.dbt_projects import DAILY, shop, write_project

RUN_ID = "019b2f3c-8a10-7c4e-9f21-5b0d6c7e8f90"
OTHER_RUN_ID = "019b2f3c-8a10-7c4e-9f21-5b0d6c7e8f91"
AT = datetime(2026, 8, 1, 12, 30, tzinfo=UTC)
STREAM = f"OBJ_{ARTIFACTS_BUCKET}"
NOTHING_SECRET = Scrubber()

Until = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture
async def store(link: NatsLink) -> ArtifactStore:
    await ensure_streams(link, StreamsConfig())
    return ArtifactStore(link)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A manifest of several chunks, and small ones of the other kinds."""
    folder = tmp_path / "target"
    folder.mkdir()
    paths = {kind: folder / name for kind, name in FILES.items()}
    for kind, path in paths.items():
        path.write_text(json.dumps({"kind": kind}))
    paths["manifest"].write_bytes(os.urandom(CHUNK_BYTES * 3 + 17))
    return paths


async def objects(link: NatsLink) -> dict[str, bytes]:
    """Everything in the bucket, as nats-py reads it."""
    bucket = await link.js.object_store(ARTIFACTS_BUCKET)
    try:
        names = [info.name for info in await bucket.list(ignore_deletes=True)]
    except NotFoundError:
        return {}
    return {name: (await bucket.get(name)).data or b"" for name in names}


async def messages(link: NatsLink) -> int:
    """Chunks and infos in the bucket's stream."""
    return (await link.js.stream_info(STREAM)).state.messages


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestRunFiles:
    async def test_are_stored_under_the_run_and_nats_py_reads_them(
        self, store: ArtifactStore, link: NatsLink, files: dict[str, Path]
    ) -> None:
        stored = await store.put_run(RUN_ID, files, NOTHING_SECRET)
        assert stored == {kind: f"{RUN_ID}/{name}" for kind, name in FILES.items()}
        read = await objects(link)
        assert read == {f"{RUN_ID}/{FILES[kind]}": files[kind].read_bytes() for kind in files}
        assert store.stats.stored == len(files)
        assert store.stats.stored_bytes == sum(map(len, read.values()))

    async def test_come_back_as_they_were(
        self, store: ArtifactStore, files: dict[str, Path], tmp_path: Path
    ) -> None:
        await store.put_run(RUN_ID, files, NOTHING_SECRET)
        into = tmp_path / "state"
        wanted = ["manifest.json", "sources.json"]
        assert await store.fetch(RUN_ID, wanted, into) == wanted
        assert names_in(into) == wanted
        for name in wanted:
            assert (into / name).read_bytes() == (tmp_path / "target" / name).read_bytes()

    async def test_what_nats_py_has_put_can_be_fetched_and_what_it_has_deleted_is_gone(
        self, store: ArtifactStore, link: NatsLink, tmp_path: Path
    ) -> None:
        bucket: ObjectStore = await link.js.object_store(ARTIFACTS_BUCKET)
        data = os.urandom(CHUNK_BYTES + 1)
        await bucket.put(f"{RUN_ID}/manifest.json", data)
        assert await store.fetch(RUN_ID, ["manifest.json"], tmp_path) == ["manifest.json"]
        assert (tmp_path / "manifest.json").read_bytes() == data
        await bucket.delete(f"{RUN_ID}/manifest.json")
        assert await store.fetch(RUN_ID, ["manifest.json"], tmp_path) == []

    async def test_of_the_same_name_replace_the_old_ones_and_leave_nothing_of_them(
        self, store: ArtifactStore, link: NatsLink, files: dict[str, Path]
    ) -> None:
        await store.put_run(RUN_ID, files, NOTHING_SECRET)
        count = await messages(link)
        files["manifest"].write_bytes(b"")
        for _ in range(2):
            await store.put_run(RUN_ID, files, NOTHING_SECRET)
            assert await messages(link) == count - 4
        assert (await objects(link))[f"{RUN_ID}/manifest.json"] == b""

    async def test_hold_no_secret_wherever_a_chunk_ends(
        self, store: ArtifactStore, link: NatsLink, files: dict[str, Path]
    ) -> None:
        secret = 'can"ary'
        for before in range(CHUNK_BYTES - 20, CHUNK_BYTES - 10):
            text = b"x" * before + json.dumps({"token": secret}).encode()
            files["manifest"].write_bytes(text)
            await store.put_run(RUN_ID, {"manifest": files["manifest"]}, Scrubber([secret]))
            data = (await objects(link))[f"{RUN_ID}/manifest.json"]
            assert data == b"x" * before + b'{"token": "*****"}'

    async def test_that_have_vanished_are_left_out_and_told(
        self, store: ArtifactStore, files: dict[str, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        files["sources"].unlink()
        stored = await store.put_run(RUN_ID, files, NOTHING_SECRET)
        assert stored.keys() == FILES.keys() - {"sources"}
        assert (store.stats.failed, caplog.messages) == (1, ["an artifact cannot be read"])

    async def test_that_there_are_none_of_are_no_reason_to_ask_the_server(
        self, nats_server: NatsServer, store: ArtifactStore
    ) -> None:
        await nats_server.kill()
        assert await store.put_run(RUN_ID, {}, NOTHING_SECRET) == {}

    async def test_need_a_run_id(self, store: ArtifactStore, tmp_path: Path) -> None:
        for name in ("", "x", "../x", "latest/shop/prod", RUN_ID.upper(), f"{RUN_ID}/x"):
            with pytest.raises(ValueError, match="not a run id"):
                await store.put_run(name, {}, NOTHING_SECRET)
        for name in ("", "x", "latest/shop", "latest/a.b/c", f"{RUN_ID}/..", "latest/a/b/c"):
            with pytest.raises(ValueError, match="neither a run id nor"):
                await store.fetch(name, [], tmp_path)
        with pytest.raises(ValueError, match=r"not artifacts: \.\./x"):
            await store.fetch(RUN_ID, ["../x"], tmp_path)
        with pytest.raises(ValueError, match="cannot be the name"):
            latest_prefix("shop", "a/b")


class _Interrupted:
    """A file during whose reading something happens to the server."""

    def __init__(self, data: bytes, at_chunk: int, happens: Callable[[], Awaitable[None]]) -> None:
        self._data, self._at_chunk, self._happens = data, at_chunk, happens
        self._loop = asyncio.get_running_loop()
        self._read = 0

    def read(self, size: int, /) -> bytes:
        self._read += 1
        if self._read == self._at_chunk:
            asyncio.run_coroutine_threadsafe(self._wait(), self._loop).result()
        chunk, self._data = self._data[:size], self._data[size:]
        return chunk

    async def _wait(self) -> None:
        await self._happens()


class TestOutage:
    async def test_in_the_middle_of_a_file_it_goes_on_where_it_was(
        self, nats_server: NatsServer, store: ArtifactStore, link: NatsLink
    ) -> None:
        async def crash() -> None:
            await nats_server.kill()
            await nats_server.restart()

        data = os.urandom(CHUNK_BYTES * 4)
        await ObjectBucket(link, ARTIFACTS_BUCKET).put("x", _Interrupted(data, 3, crash), {})
        assert link.reconnects == 1
        assert await objects(link) == {"x": data}
        assert await messages(link) == 4 + 1

    async def test_the_files_are_stored_when_the_server_is_back(
        self,
        nats_server: NatsServer,
        store: ArtifactStore,
        link: NatsLink,
        files: dict[str, Path],
        until: Until,
    ) -> None:
        await nats_server.kill()
        await until(lambda: not link.connected)
        storing = asyncio.create_task(store.put_run(RUN_ID, files, NOTHING_SECRET))
        await nats_server.restart()
        assert (await storing).keys() == FILES.keys()
        assert (await objects(link)).keys() == {f"{RUN_ID}/{name}" for name in FILES.values()}

    async def test_a_chunk_whose_answer_was_lost_for_long_is_not_stored_twice(
        self, store: ArtifactStore, link: NatsLink
    ) -> None:
        """As after the duplicate window: the message id says nothing, the sequence does."""
        bucket = ObjectBucket(link, ARTIFACTS_BUCKET)
        first = await bucket._put_chunk("n", b"x", 0, 0, {})
        assert await bucket._put_chunk("n", b"x", 999, 0, {}) == first
        assert await messages(link) == 1

    async def test_a_cancelled_put_leaves_no_chunks(
        self, store: ArtifactStore, link: NatsLink
    ) -> None:
        reached = asyncio.Event()
        cancelled = asyncio.Event()

        async def reach() -> None:
            reached.set()
            await cancelled.wait()

        source = _Interrupted(os.urandom(CHUNK_BYTES * 4), 3, reach)
        putting = asyncio.create_task(ObjectBucket(link, ARTIFACTS_BUCKET).put("x", source, {}))
        await reached.wait()
        assert await messages(link) == 2
        putting.cancel()
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await putting
        assert await messages(link) == 0

    async def test_fetching_gives_up_in_time(
        self, nats_server: NatsServer, store: ArtifactStore, tmp_path: Path
    ) -> None:
        await nats_server.kill()
        with pytest.raises(NatsUnavailable):
            await store.fetch(RUN_ID, ["manifest.json"], tmp_path / "state", retry_for_s=0.2)
        assert names_in(tmp_path / "state") == []

    async def test_fetching_waits_for_a_server_that_comes_back(
        self,
        nats_server: NatsServer,
        store: ArtifactStore,
        files: dict[str, Path],
        tmp_path: Path,
    ) -> None:
        await store.put_run(RUN_ID, files, NOTHING_SECRET)
        await nats_server.kill()
        fetching = asyncio.create_task(
            store.fetch(RUN_ID, ["manifest.json"], tmp_path / "state", retry_for_s=60)
        )
        await nats_server.restart()
        assert await fetching == ["manifest.json"]
        assert (tmp_path / "state/manifest.json").read_bytes() == files["manifest"].read_bytes()


class TestRefused:
    async def test_a_store_without_room_gets_what_fits_and_is_told_of_once(
        self,
        store: ArtifactStore,
        link: NatsLink,
        files: dict[str, Path],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        info = await link.js.stream_info(STREAM)
        await link.js.update_stream(info.config.evolve(max_bytes=2 * CHUNK_BYTES))
        big = {"manifest": files["manifest"]}
        for _ in range(2):
            assert await store.put_run(RUN_ID, big, NOTHING_SECRET) == {}
        assert await messages(link) == 0
        assert caplog.messages == ["an artifact was not stored"]
        assert "dbtstream setup" in vars(caplog.records[0])["hint"]
        stored = await store.put_run(RUN_ID, files, NOTHING_SECRET)
        assert stored.keys() == FILES.keys() - {"manifest"}
        assert (store.stats.stored, store.stats.failed) == (len(files) - 1, 3)

    async def test_a_user_who_may_not_write_is_told_at_once(
        self, tmp_path: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        """And not after a timeout, which would look like an outage and be tried for ever."""
        extra = """authorization { users: [
            { user: admin, password: p }
            { user: w, password: p, permissions: { subscribe: ">", publish: { allow: [
                "_INBOX.>", "$JS.API.STREAM.MSG.GET.OBJ_dbt_artifacts" ] } } }
        ] }"""
        async with NatsServer.start(tmp_path / "nats", config_extra=extra) as server:
            links = [
                NatsLink(NatsConfig(servers=(server.url.replace("//", f"//{user}:p@"),)), name=user)
                for user in ("admin", "w")
            ]
            async with links[0] as admin, links[1] as worker:
                await admin.wait_connected(10)
                await worker.wait_connected(10)
                await ensure_streams(admin, StreamsConfig())
                store = ArtifactStore(worker)
                caplog.set_level(logging.WARNING, "dbtstream.artifact_store")
                assert await store.put_run(RUN_ID, files, NOTHING_SECRET) == {}
                assert store.stats.failed == len(files)
                told = [r for r in caplog.records if r.name == "dbtstream.artifact_store"]
                assert len(told) == 1
                assert "permissions violation" in vars(told[0])["error"].lower()
                assert await messages(admin) == 0

    async def test_where_there_is_no_bucket_setup_is_named(
        self, link: NatsLink, files: dict[str, Path], tmp_path: Path
    ) -> None:
        store = ArtifactStore(link)
        assert await store.put_run(RUN_ID, files, NOTHING_SECRET) == {}
        with pytest.raises(NatsRefused, match="stream not found"):
            await store.fetch(RUN_ID, ["manifest.json"], tmp_path)


class TestLatest:
    async def set_latest(
        self, store: ArtifactStore, files: dict[str, Path], command: str = "build"
    ) -> list[str]:
        return await store.set_latest(
            "shop", "prod", command, files, NOTHING_SECRET, run_id=RUN_ID, finished_at=AT
        )

    async def test_is_what_the_command_stands_for_and_says_whose_it_is(
        self, store: ArtifactStore, link: NatsLink, files: dict[str, Path]
    ) -> None:
        names = ["latest/shop/prod/manifest.json", "latest/shop/prod/run_results.json"]
        assert await self.set_latest(store, files) == names
        assert await self.set_latest(store, files, "test") == names[1:]
        assert await self.set_latest(store, files, "list") == []
        assert (await objects(link)).keys() == set(names)
        bucket = await link.js.object_store(ARTIFACTS_BUCKET)
        info = await bucket.get_info(names[0])
        assert info.description == (
            f"dbt build of shop prod, run {RUN_ID}, finished 2026-08-01T12:30:00.000000Z"
        )
        assert info.headers is not None
        assert info.headers["dbtstream-run-id"] == [RUN_ID]

    async def test_is_replaced_by_the_next_good_run_and_kept_by_one_without_the_file(
        self, store: ArtifactStore, files: dict[str, Path], tmp_path: Path
    ) -> None:
        await self.set_latest(store, files)
        files["run_results"].write_text("newer")
        await self.set_latest(store, {"run_results": files["run_results"]})
        wanted = ["manifest.json", "run_results.json"]
        assert await store.fetch(latest_prefix("shop", "prod"), wanted, tmp_path / "s") == wanted
        assert (tmp_path / "s" / wanted[0]).read_bytes() == files["manifest"].read_bytes()
        assert (tmp_path / "s" / wanted[1]).read_text() == "newer"
        assert await store.fetch(latest_prefix("shop", "ci"), wanted, tmp_path / "s") == []

    async def test_outlives_the_age_at_which_a_runs_own_files_go(
        self, link: NatsLink, files: dict[str, Path], tmp_path: Path
    ) -> None:
        """A target that runs monthly has its state, too."""
        await ensure_streams(link, StreamsConfig(events_max_age_s=1))
        store = ArtifactStore(link)
        await self.set_latest(store, files)
        await store.put_run(RUN_ID, {"manifest": files["manifest"]}, NOTHING_SECRET)
        async with asyncio.timeout(60):
            while await store.fetch(RUN_ID, ["manifest.json"], tmp_path / "run"):
                continue
        prefix = latest_prefix("shop", "prod")
        assert await store.fetch(prefix, ["manifest.json"], tmp_path) == ["manifest.json"]
        assert (tmp_path / "manifest.json").read_bytes() == files["manifest"].read_bytes()
        assert await messages(link) == 4 + 1 + 1 + 1


class TestFetching:
    async def test_what_is_not_whole_is_not_there(
        self,
        store: ArtifactStore,
        link: NatsLink,
        files: dict[str, Path],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A chunk has expired; a byte is another one."""
        await store.put_run(RUN_ID, {"manifest": files["manifest"]}, NOTHING_SECRET)
        await link.js.delete_msg(STREAM, 2)
        into = tmp_path / "state"
        assert await store.fetch(RUN_ID, ["manifest.json"], into) == []
        await store.put_run(OTHER_RUN_ID, {"sources": files["sources"]}, NOTHING_SECRET)
        chunk = (await link.js.stream_info(STREAM)).state.last_seq - 1
        subject = (await link.js.get_msg(STREAM, chunk)).subject
        assert subject is not None
        await link.js.delete_msg(STREAM, chunk)
        await link.js.publish(subject, b"other")
        assert await store.fetch(OTHER_RUN_ID, ["sources.json"], into) == []
        assert caplog.messages == ["a stored object is not complete"] * 2
        assert names_in(into) == []

    async def test_keeps_an_old_file_until_the_new_one_is_whole_and_private(
        self, store: ArtifactStore, files: dict[str, Path], tmp_path: Path
    ) -> None:
        """Whatever the umask, and whoever may have made the old one readable."""
        into = tmp_path / "state"
        into.mkdir(mode=0o755)
        (into / "manifest.json").write_text("old")
        assert await store.fetch(RUN_ID, ["manifest.json"], into) == []
        assert (into / "manifest.json").read_text() == "old"
        await store.put_run(RUN_ID, files, NOTHING_SECRET)
        (into / ".manifest.json.part").write_text("of a fetch that was killed")
        before = os.umask(0)
        try:
            await store.fetch(RUN_ID, ["manifest.json"], into)
        finally:
            os.umask(before)
        assert stat.S_IMODE(into.stat().st_mode) == 0o700
        assert stat.S_IMODE((into / "manifest.json").stat().st_mode) == 0o600
        assert (into / "manifest.json").read_bytes() == files["manifest"].read_bytes()
        assert names_in(into) == ["manifest.json"]


# -- real dbt --------------------------------------------------------------------------------

CANARY = 'c4n"ry\\é'


class Shop:
    """A project with two targets in one database, and its daemon's folders."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "shop"
        outputs = {
            target: {"type": "duckdb", "path": str(self.root / "shop.duckdb"), "schema": target}
            for target in ("prod", "ci")
        }
        profiles = {"shop": {"target": "ci", "outputs": outputs}}
        write_project(self.root, {**shop(), "profiles.yml": json.dumps(profiles)})
        self.config = Config(worker=WorkerConfig(state_dir=str(folder / "state")))
        self.project = ProjectConfig(
            path=str(self.root),
            targets=("prod", "ci"),
            profiles_dir=str(self.root),
            env={"DBT_SEND_ANONYMOUS_USAGE_STATS": "0"},
            secrets={"DBT_ENV_SECRET_TOKEN": SecretRef(env="SHOP_TOKEN")},
        )

    def prepare(self, target: str, run_id: str) -> Workspace:
        return prepare_workspace(self.config, "shop", self.project, target, run_id, "")

    def dbt(self, workspace: Workspace, *words: str) -> dict[str, Any]:
        """Run dbt as its process would be; its run_results.json."""
        ran = subprocess.run(
            [sys.executable, "-c", "from dbt.cli.main import cli; cli()", *words],
            cwd=self.root,
            env=workspace.environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        results = (workspace.target_path / "run_results.json").read_text()
        document: dict[str, Any] = json.loads(results)
        return document


async def test_dbt_compares_with_and_defers_to_another_targets_last_run_that_holds_no_secret(
    store: ArtifactStore, link: NatsLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_TOKEN", CANARY)
    project = Shop(tmp_path)
    prod = await asyncio.to_thread(project.prepare, "prod", RUN_ID)
    build = ("build", "--target", "prod", "--vars", json.dumps({"token": CANARY}))
    results = await asyncio.to_thread(project.dbt, prod, *build)
    assert results["args"]["vars"] == {"token": CANARY}

    scrubber = Scrubber.for_environment(prod.environment, prod.secret_names)
    files = await asyncio.to_thread(
        artifact_files, prod.target_path, prod.log_path, prod.attempt_dir, scrubber
    )
    assert files.keys() == {"manifest", "run_results", "log"}
    stored = await store.put_run(RUN_ID, files, scrubber)
    assert stored.keys() == files.keys()
    await store.set_latest("shop", "prod", "build", files, scrubber, run_id=RUN_ID, finished_at=AT)
    everything = await objects(link)
    assert len(everything) == 5
    assert not any(b"c4n" in data for data in everything.values())
    kept = json.loads(everything[stored["run_results"]])
    assert kept["args"]["vars"] == {"token": "*****"}

    (project.root / "models/daily.sql").write_text(DAILY + " where amount > 0")
    ci = await asyncio.to_thread(project.prepare, "ci", OTHER_RUN_ID)
    wanted = ["manifest.json", "run_results.json"]
    assert await store.fetch(latest_prefix("shop", "prod"), wanted, ci.state_path) == wanted
    ci.environment["DBT_STATE"] = str(ci.state_path)
    words = ("build", "--target", "ci", "--select", "state:modified", "--defer")
    results = await asyncio.to_thread(project.dbt, ci, *words)
    assert [result["unique_id"] for result in results["results"]] == ["model.shop.daily"]
    assert '"prod"."orders"' in results["results"][0]["compiled_code"]
