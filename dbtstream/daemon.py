"""The life of a worker process: start, run, drain, stop, in the order in which they happen.

    start   open the HTTP port, connect, create streams, settle what a predecessor left, open for
            requests
    run     until somebody asks for a stop or a part of the daemon dies
    drain   no new request, and those that wait go back; running dbt may go on for
            `drain_timeout_s`, then it is cancelled or handed over (`on_drain`)
    stop    control signs off, states and events are written, connections close, telemetry is
            sent as far as it can be

SIGTERM and SIGINT ask for the drain; a second one ends dbt at once, a third one leaves.
"""

import asyncio
import contextlib
import fcntl
import logging
import signal
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

import dbtstream
from dbtstream.artifact_store import ArtifactStore
from dbtstream.config import Config, HttpConfig, WorkerConfig, split_listen
from dbtstream.control import OWNER_ANSWERS_S, Control
from dbtstream.errors import ConfigError, NatsRefused, Superseded
from dbtstream.execution import Services
from dbtstream.gauges import Gauges
from dbtstream.health import Health, Stage
from dbtstream.http_port import HttpPort
from dbtstream.lineage_store import LineageStore
from dbtstream.measurements import last_completions
from dbtstream.nats_connection import CLOSE_LIMIT_S
from dbtstream.nats_link import NatsLink
from dbtstream.outbox import Outbox
from dbtstream.predecessor import settle_predecessor
from dbtstream.publishers.jetstream import JetStreamPublisher
from dbtstream.publishers.openlineage import OpenLineageOut, OpenLineageSender
from dbtstream.pulse import Pulse
from dbtstream.run_lease import Leases
from dbtstream.sql_process import SqlReader
from dbtstream.store import MAX_LISTED, NodeStates, Store
from dbtstream.streams import check_streams, ensure_streams
from dbtstream.telemetry import CLOSE_S as TELEMETRY_CLOSE_S
from dbtstream.telemetry import Telemetry
from dbtstream.templates import Templates
from dbtstream.worker import Worker

logger = logging.getLogger(__name__)

LEFTOVERS_S = 60.0
"""How long a start waits for a predecessor's events; what is left then goes on beside the work."""

CLOSE_S = 10.0
"""What the last writes may take when the runs are over."""

TELEMETRY_S = TELEMETRY_CLOSE_S + 1.0
"""And telemetry and the HTTP port after that."""


class Daemon:
    """One worker process. `run` once; `stop` at any time and as often as one likes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.worker: Worker | None = None
        self.openlineage: list[OpenLineageSender] = []
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stop_asked = asyncio.Event()
        self._hurry = asyncio.Event()
        self._leave = asyncio.Event()
        self._pulse = Pulse()
        self._health = Health(self._pulse, config.state_dir)
        self._telemetry: Telemetry
        self.http: HttpPort | None = None

    async def run(self) -> None:
        """Raises NatsRefused when NATS cannot be used, ConfigError when the config cannot."""
        logger.info(
            "starting",
            extra={
                "action": "daemon.start",
                "version": dbtstream.__version__,
                "worker": self.config.worker_name,
                "projects": sorted(self.config.projects),
                "config": self.config.source,
            },
        )
        try:
            async with self._observed():
                await self._run()
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
                self._ready.exception()  # whoever waits for it gets it; nobody has to
            raise
        logger.info("stopped", extra={"action": "daemon.stopped"})

    async def _run(self) -> None:
        nats = self.config.nats
        async with (
            NatsLink(nats, name=f"dbtstream {self.config.worker_name} queue") as queue,
            NatsLink(nats, name=f"dbtstream {self.config.worker_name} events") as events,
        ):
            self._prepare_gauges(queue, events)
            if await self._connected(queue, events):
                await self._serve(queue, events)

    def _prepare_gauges(self, queue: NatsLink, events: NatsLink) -> None:
        """Where somebody may ask for them."""
        self._health.links = (queue, events)
        if self.http or self._telemetry.metrics:
            gauges = Gauges(self.config, (queue, events), self._telemetry.flow)
            self._telemetry.look = lambda: gauges.last
            self._health.gauges = gauges
            gauges.look()

    async def ready(self) -> None:
        """Until requests are served. Raises what made the start fail."""
        await asyncio.shield(self._ready)

    def stop(self) -> None:
        """Drain; the second time, cancel what runs; the third time, leave it."""
        step = next(
            (e for e in (self._stop_asked, self._hurry, self._leave) if not e.is_set()), None
        )
        if step is not None:
            step.set()

    def install_signal_handlers(self, loop: asyncio.AbstractEventLoop) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    # In the order of a life.

    @contextlib.asynccontextmanager
    async def _observed(self) -> AsyncIterator[None]:
        """With telemetry and the HTTP port, from the first moment to the last."""
        self._telemetry = await asyncio.to_thread(Telemetry, self.config)
        try:
            self.http = await asyncio.to_thread(
                open_port, self.config, self._health, self._telemetry
            )
            pulse = asyncio.create_task(self._pulse.run(self._ticked), name="pulse")
            try:
                yield
            finally:
                pulse.cancel()
                if self.http is not None:
                    await asyncio.to_thread(self.http.close)
        finally:
            await asyncio.to_thread(self._telemetry.close)

    def _ticked(self, lag_s: float) -> None:
        self._telemetry.loop_lag(lag_s)
        if self._health.gauges is not None:
            self._health.gauges.look()

    async def _connected(self, queue: NatsLink, events: NatsLink) -> bool:
        """Wait for NATS as long as it takes; False when we are stopped meanwhile."""
        stopped = asyncio.ensure_future(self._stop_asked.wait())
        try:
            for link in (queue, events):
                waiting = asyncio.ensure_future(link.wait_connected(None))
                await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    waiting.cancel()
                    await asyncio.wait({waiting})
                    return False
                waiting.result()
        finally:
            stopped.cancel()
        return True

    async def _serve(self, queue: NatsLink, events: NatsLink) -> None:
        with await asyncio.to_thread(own_state_dir, self.config):
            await self._prepare_streams(queue)
            await self._work(queue, events)

    async def _work(self, queue: NatsLink, events: NatsLink) -> None:
        store = Store(queue)
        node_states = NodeStates(store)
        lineage = LineageStore(events)
        limits = self.config.worker
        leases = Leases(
            queue,
            worker=self.config.worker_name,
            ttl_s=limits.lease_ttl_s,
            renew_s=limits.heartbeat_s,
            cut_off=limits.cut_off,
        )
        openlineage = await asyncio.to_thread(OpenLineageOut, self.config, events)
        self.openlineage = openlineage.senders
        async with (
            SqlReader() as sql_reader,
            Templates(limits.warm_starts) as templates,
            asyncio.TaskGroup() as parts,
        ):
            templates.prepare(self.config)
            services = Services(
                self.config,
                events,
                store,
                node_states,
                ArtifactStore(events),
                lineage,
                sql_reader,
                templates,
                self._telemetry.observer,
                self._telemetry.on_stored,
            )
            worker = self.worker = Worker(self.config, queue, services, leases)
            sending = parts.create_task(openlineage.run(), name="openlineage")
            leftovers = parts.create_task(
                self._settle_leftovers(queue, events, leases), name="leftovers"
            )
            # A redelivered run is judged by its stored events: those must be out before.
            await asyncio.wait({leftovers}, timeout=LEFTOVERS_S)
            states = [
                parts.create_task(node_states.run(), name="node states"),
                parts.create_task(lineage.behind.run(), name="lineage"),
            ]
            async with Control(self.config, queue, services, worker):
                working = parts.create_task(worker.run(), name="worker")
                watching = self._watch(parts, worker, store, templates)
                self._ready.set_result(None)
                self._health.stage = Stage.SERVING
                logger.info("serving", extra={"action": "daemon.ready"})
                await self._until_stop(working)
                self._health.stage = Stage.DRAINING
                await self._drain(worker, working)
            node_states.close()
            lineage.behind.close()
            for task in watching:
                task.cancel()
            sending.cancel()  # what has not gone out is in the stream
            last = {*states, leftovers, sending}
            await asyncio.wait(last, timeout=0.0 if self._leave.is_set() else CLOSE_S)
            for task in last:
                task.cancel()

    def _watch(
        self, parts: asyncio.TaskGroup, worker: Worker, store: Store, templates: Templates
    ) -> list[asyncio.Task[None]]:
        if (gauges := self._health.gauges) is None:
            return []
        gauges.worker, gauges.openlineage = worker, self.openlineage
        gauges.templates = templates
        return [
            parts.create_task(gauges.watch_queues(), name="queue gauges"),
            parts.create_task(gauges.watch_templates(), name="template gauges"),
            parts.create_task(self._recall(store), name="stored runs"),
        ]

    async def _recall(self, store: Store) -> None:
        """Gauges of how runs and freshness checks last ended know those before our start, too.

        Whatever goes wrong in here must not end the daemon.
        """
        if self._telemetry.metrics is None:
            return
        known = self._telemetry.known
        try:
            self._telemetry.recall(last_completions(known, await store.list_runs(limit=MAX_LISTED)))
            for project, target in known.targets:
                states = await store.list_nodes(project, target, "source")
                self._telemetry.recall(known.recall_sources(project, target, states))
        except Exception as error:  # noqa: BLE001 - see above
            logger.warning(
                "cannot read how earlier runs ended; metrics tell of later ones only",
                extra={
                    "action": "daemon.runs_unread",
                    "error": f"{type(error).__name__}: {error}",
                },
            )

    async def _prepare_streams(self, link: NatsLink) -> None:
        if self.config.streams.manage:
            for line in await ensure_streams(link, self.config.streams):
                logger.debug("stream prepared", extra={"action": "daemon.streams", "line": line})
        elif problems := await check_streams(link, self.config.streams):
            raise NatsRefused(
                "to serve", "; ".join(problems), "`dbtstream setup` creates what is missing"
            )

    async def _settle_leftovers(self, queue: NatsLink, events: NatsLink, leases: Leases) -> None:
        await self._publish_leftovers(events)
        await settle_predecessor(self.config, queue, leases)

    async def _publish_leftovers(self, link: NatsLink) -> None:
        """Events that a predecessor on this machine had on disk and not in JetStream."""
        directory = self.config.state_dir / "outbox"
        for outbox in await Outbox.recover(
            directory, max_bytes=self.config.worker.outbox_max_bytes
        ):
            if (gauges := self._health.gauges) is not None:
                gauges.leftovers = [outbox]
            publisher = JetStreamPublisher(link, outbox, on_stored=self._telemetry.on_stored)
            outbox.close_input()
            facts: dict[str, Any] = {"action": "daemon.leftovers", "run_id": outbox.run_id}
            try:
                await publisher.run()
            except Superseded as error:
                # It has told of them as lost, and run them again: what we know is old.
                facts |= {"problem": str(error), "events": outbox.stats.waiting}
                logger.warning("another worker has what a predecessor left", extra=facts)
            else:
                facts |= {"events": publisher.stats.sent}
                logger.warning("published what a predecessor had left", extra=facts)
            await outbox.remove()
            if gauges is not None:
                gauges.leftovers = []

    async def _until_stop(self, working: asyncio.Task[None]) -> None:
        stopped = asyncio.ensure_future(self._stop_asked.wait())
        await asyncio.wait({stopped, working}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()

    async def _drain(self, worker: Worker, working: asyncio.Task[None]) -> None:
        """No new request; what runs may go on for a while, is then ended, is then left."""
        worker.stop()
        if worker.executions:
            logger.info(
                "draining",
                extra={
                    "action": "daemon.drain",
                    "running": sorted(worker.executions),
                    "timeout_s": self.config.worker.drain_timeout_s,
                },
            )
        limits = self.config.worker
        if await self._done(working, self._hurry, limits.drain_timeout_s):
            return
        worker.end_all(by="shutdown")
        ladder_s = limits.cancel_grace_s + limits.kill_grace_s + CLOSE_S
        if await self._done(working, self._leave, ladder_s):
            return
        logger.error(
            "left before all runs had ended; their events go out at the next start",
            extra={"action": "daemon.left", "running": sorted(worker.executions)},
        )
        working.cancel()
        await asyncio.wait({working}, timeout=CLOSE_S)

    async def _done(
        self, working: asyncio.Task[None], enough: asyncio.Event, timeout_s: float
    ) -> bool:
        impatient = asyncio.ensure_future(enough.wait())
        await asyncio.wait(
            {working, impatient}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        impatient.cancel()
        return working.done()


def stop_budget_s(worker: WorkerConfig) -> float:
    """What a stop may take at the most, all steps together: a service manager must wait longer."""
    drain_s = worker.drain_timeout_s
    ladder_s = worker.cancel_grace_s + worker.kill_grace_s + CLOSE_S
    left_s = CLOSE_S  # runs that had to be left
    written_s = CLOSE_S  # states and events
    control_s = OWNER_ANSWERS_S
    links_s = 2 * 2 * CLOSE_LIMIT_S  # flush and close, of both connections
    return drain_s + ladder_s + left_s + written_s + control_s + links_s + TELEMETRY_S


def open_port(config: Config, health: Health, telemetry: Telemetry) -> HttpPort | None:
    """None where it is off, or another daemon of this machine has the default one.

    Blocking. Raises ConfigError.
    """
    listen = config.http.listen
    if not listen:
        return None
    routes = {"/livez": health.livez, "/readyz": health.readyz, "/metrics": telemetry.scrape}
    try:
        port = HttpPort(*split_listen(listen), routes)
    except OSError as error:
        problem = f"cannot listen on {listen}: {error.strerror or error}"
        if listen != HttpConfig().listen:
            raise ConfigError(config.source, "http.listen", problem) from error
        logger.warning(
            "the HTTP port is taken; there is no /livez, /readyz and /metrics of this daemon",
            extra={"action": "daemon.no_port", "listen": listen, "problem": problem},
        )
        return None
    logger.info("listening", extra={"action": "daemon.http", "address": port.address})
    return port


def own_state_dir(config: Config) -> BinaryIO:
    """The state directory, made if need be and locked until the file is closed.

    A second daemon on it would publish, and then delete, the first one's live outboxes.
    Blocking. Raises ConfigError.
    """
    folder = config.state_dir
    try:
        # What dbt compiles and what it says is nobody else's business on this machine.
        folder.mkdir(0o700, parents=True, exist_ok=True)
        lock = (folder / "lock").open("wb")
    except OSError as error:
        raise ConfigError(
            config.source, "worker.state_dir", f"{folder} cannot be used: {error.strerror}"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(
            config.source,
            "worker.state_dir",
            f"another daemon works in {folder}",
            "give each daemon of a machine a state_dir of its own",
        ) from error
    return lock
