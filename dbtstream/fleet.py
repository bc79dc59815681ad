"""What a fleet of workers is doing, put together from answers and events: for `dbtstream top`.

`Fleet` takes what workers say of themselves (`take_workers`), what control lists (`take_runs`)
and live events in between (`take_event`), and gives a `FleetView` of it for any moment. An answer
says up to which `seq` of a run's events it counts, so none is counted twice, and an event that
was missed is made good by the next answer. Pure: no clock, no I/O. Memory is bounded: by what is
under way, and by the MAX_ constants.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import msgspec

from dbtstream.events import (
    AnyEvent,
    NodeFinished,
    NodeStarted,
    RunCancel,
    RunFinished,
    RunPlanned,
    RunProgress,
    RunQueued,
    RunRejected,
    RunStarted,
)
from dbtstream.messages import NodeAtWork, RunAtWork, RunList, RunView, WorkerStatus
from dbtstream.statuses import RunStatus
from dbtstream.terminal import BAD, message_of

MAX_ENDED = 20
MAX_FAILURES = 50
MAX_NODES = 64  # of a run, that are at work and known by name; dbt has seldom so many threads
MAX_MESSAGE_CHARS = 2_000
RATE_OVER_S = 10
CLOCK_SKEW = timedelta(minutes=1)
"""The broker's clock may be so far behind the worker's."""

FORGET_WORKER = timedelta(minutes=5)
"""A worker that does not answer is shown for so long: somebody may be looking for it."""


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """One worker; `silent_s` since its last answer, null if it gave the last one asked for."""

    worker: str
    version: str
    host: str
    started_at: datetime
    slots: int
    used: int
    draining: bool = False
    silent_s: float | None = None
    projects: list[str] = []
    run_ids: list[str] = []


class QueueRow(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that no worker has been handed, the oldest of which was stored `since` then."""

    project: str
    target: str
    waiting: int
    since: datetime | None = None
    oldest_wait_s: float | None = None
    running: str | None = None  # the run that they wait for


class RunRow(msgspec.Struct, frozen=True, kw_only=True):
    """A run in a worker's hands; counts of its current attempt, `total` null until it is known."""

    run_id: str
    project: str
    target: str
    status: RunStatus
    args: list[str] = []
    worker: str | None = None
    attempt: int = 1
    queued_at: datetime | None = None
    started_at: datetime | None = None
    elapsed_s: float | None = None  # since dbt was started
    done: int = 0
    total: int | None = None
    by_status: dict[str, int] = {}
    running: int = 0
    nodes: list[NodeAtWork] = []
    eta_s: float | None = None
    cancel: str | None = None  # the last step of stopping it
    unstored: int = 0


class EndedRow(msgspec.Struct, frozen=True, kw_only=True):
    run_id: str
    project: str
    target: str
    status: RunStatus
    args: list[str] = []
    finished_at: datetime
    elapsed_s: float | None = None
    exit_code: int | None = None
    error: str | None = None


class FailureRow(msgspec.Struct, frozen=True, kw_only=True):
    """A node that did not pass, or (without a node) a run that did not get as far."""

    at: datetime
    project: str
    target: str
    run_id: str
    status: str
    unique_id: str | None = None
    resource_type: str | None = None
    name: str | None = None
    message: str | None = None


class FleetView(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet at the moment `at`: what `dbtstream top --once --json` prints."""

    at: datetime
    workers: list[WorkerRow]
    queues: list[QueueRow]
    runs: list[RunRow]
    ended: list[EndedRow]  # the last of them first
    failures: list[FailureRow]  # the last of them first
    events_per_s: float | None = None  # of runs and nodes; null if events were not watched


@dataclass(slots=True)
class _Worker:
    status: WorkerStatus
    answered_at: datetime
    silent: bool = False


@dataclass(slots=True)
class _Run:
    """What is known of a run up to event `seq` of its attempt."""

    now: RunAtWork
    worker: str | None
    nodes: dict[str, NodeAtWork]
    by_status: Counter[str]
    touched_at: datetime
    seq: int = 0
    done: int = 0
    running: int = 0
    cancel: str | None = None

    @classmethod
    def of(cls, now: RunAtWork, worker: str | None, at: datetime) -> "_Run":
        nodes = {node.unique_id: node for node in now.nodes}
        counts = Counter(now.by_status)
        return cls(now, worker, nodes, counts, at, now.last_seq, now.done, now.running)


@dataclass(slots=True)
class _Rate:
    """Events per second, of the last whole seconds."""

    counts: Counter[int] = field(default_factory=Counter)
    since: datetime | None = None

    def note(self, at: datetime) -> None:
        self.since = self.since or at
        self.counts[int(at.timestamp())] += 1
        if len(self.counts) > RATE_OVER_S + 1:
            del self.counts[min(self.counts)]

    def per_s(self, now: datetime) -> float:
        if self.since is None:
            return 0.0
        this = int(now.timestamp())
        over_s = min(RATE_OVER_S, max(1, this - int(self.since.timestamp())))
        return sum(self.counts[s] for s in range(this - over_s, this) if s in self.counts) / over_s


class Fleet:
    """All of it, or of one project or target. `at` and `now` are this machine's time."""

    def __init__(self, *, project: str | None = None, target: str | None = None) -> None:
        self._project, self._target = project, target
        self._workers: dict[tuple[str, datetime], _Worker] = {}
        self._runs: dict[str, _Run] = {}
        self._ended: dict[str, EndedRow] = {}
        self._failures: dict[str, FailureRow] = {}
        self._waiting: dict[str, int] = {}
        self._waiting_since: dict[str, datetime] = {}
        self._rate: _Rate | None = None
        self.told = 0
        """Grows with all that is told."""
        self._gone: deque[str] = deque(maxlen=10 * MAX_ENDED)  # a late answer may still list them

    # What is told

    def take_workers(
        self, answers: Iterable[WorkerStatus], *, asked_at: datetime, at: datetime
    ) -> None:
        """Of all workers that answered when they were asked."""
        self.told += 1
        # Two daemons may have one name, and one that was started again has its old one.
        answered = {(status.worker, status.started_at): status for status in answers}
        names = {name for name, _ in answered}
        for key, status in answered.items():
            self._workers[key] = _Worker(status, at)
            for run in status.runs:
                self._take_run(run, status.worker, at)
        for key, known in list(self._workers.items()):
            known.silent = key not in answered
            left = known.silent and (known.status.draining or key[0] in names)
            if left or at - known.answered_at > FORGET_WORKER:
                del self._workers[key]
                names.add(key[0])
        held = {run.run_id for status in answered.values() for run in status.runs}
        self._drop_what_left(names, held, asked_at)

    def _take_run(self, now: RunAtWork, worker: str, at: datetime) -> None:
        over = now.status.is_terminal or now.run_id in self._gone
        if over or not self._covers(now.project, now.target):
            return
        known = self._runs.get(now.run_id)
        # What events have told since may be more than what this answer counts.
        if known and (known.now.attempt, known.seq) > (now.attempt, now.last_seq):
            return
        self._runs[now.run_id] = run = _Run.of(now, worker, at)
        run.cancel = known.cancel if known and known.now.attempt == now.attempt else None

    def _drop_what_left(self, names: set[str], held: set[str], asked_at: datetime) -> None:
        """Runs that their worker does not have any more, with an end that we missed, or whose
        worker is forgotten. Of one that is still under way, control tells."""
        for run_id, run in list(self._runs.items()):
            if run.worker in names and run_id not in held and run.touched_at < asked_at:
                del self._runs[run_id]

    def take_runs(self, listed: RunList, at: datetime) -> None:
        """What control knows: the queue, runs that ended, and runs whose worker does not answer."""
        self.told += 1
        self._waiting = listed.waiting
        self._waiting_since = listed.waiting_since
        for view in listed.runs:
            if not self._covers(view.project, view.target):
                continue
            if view.status.is_terminal:
                row = _ended_row(view, at)
                self._end(row)
                if row.error:
                    self._fail(row.run_id, _failure_of_run(row))
            elif view.worker and view.run_id not in self._runs and view.run_id not in self._gone:
                self._runs[view.run_id] = _Run.of(_at_work(view), view.worker, at)

    def watch_events(self, at: datetime) -> None:
        """From here on `take_event` is told of each that comes."""
        self._rate = _Rate(since=at)

    def take_event(self, event: AnyEvent, at: datetime) -> None:
        """Of a run or node, live: in the order of each run, maybe with holes."""
        if not self._covers(event.project, event.target):
            return
        self.told += 1
        if self._rate is not None:
            self._rate.note(at)
        match event:
            case RunRejected():
                self._fail(event.run_id, _failure_of_rejection(event))
            case RunFinished():
                self._finished(event)
            case _ if event.run_id not in self._gone:
                self._progress(event, at)

    def take_failure(self, event: AnyEvent) -> None:
        """From the stored events, for the list of failures only."""
        if isinstance(event, NodeFinished) and self._covers(event.project, event.target):
            self.told += 1
            self._fail(event.event_id, _failure_of_node(event))

    def failed_since(self) -> datetime | None:
        """A moment before the first failure of all runs with failures that are known here."""
        ended = [row for row in self._ended.values() if row.status is not RunStatus.SUCCESS]
        begun = [row.finished_at - timedelta(seconds=row.elapsed_s or 0) for row in ended]
        begun += [
            run.now.started_at
            for run in self._runs.values()
            if run.now.started_at is not None and any(run.by_status[status] for status in BAD)
        ]
        return min(begun) - CLOCK_SKEW if begun else None

    # Events

    def _progress(self, event: AnyEvent, at: datetime) -> None:
        run = self._runs.get(event.run_id)
        if run is None or event.attempt > run.now.attempt:
            now = RunAtWork(
                run_id=event.run_id,
                project=event.project,
                target=event.target,
                status=RunStatus.QUEUED,
                args=run.now.args if run else [],
                attempt=event.attempt,
                queued_at=run.now.queued_at if run else None,
            )
            run = self._runs[event.run_id] = _Run.of(now, event.worker, at)
        if event.attempt < run.now.attempt or event.seq <= run.seq:
            return
        run.seq, run.touched_at, run.worker = event.seq, at, event.worker
        self._apply(run, event)

    def _apply(self, run: _Run, event: AnyEvent) -> None:
        now = run.now
        match event:
            case RunQueued():
                run.now = msgspec.structs.replace(now, args=event.args, queued_at=event.time)
            case RunStarted():
                run.now = msgspec.structs.replace(
                    now, args=event.args, status=RunStatus.RUNNING, started_at=event.time
                )
            case RunPlanned():
                run.now = msgspec.structs.replace(
                    now, total=event.node_count, status=RunStatus.RUNNING
                )
            case RunProgress():
                run.now = msgspec.structs.replace(
                    now, total=event.counts.total, eta_s=event.eta_s, status=RunStatus.RUNNING
                )
                run.done, run.running = event.counts.done, event.counts.running
                run.by_status = Counter(event.counts.by_status)
            case RunCancel():
                run.cancel = event.step
            case NodeStarted():
                run.running += 1
                if len(run.nodes) < MAX_NODES:
                    node = event.node
                    run.nodes[node.unique_id] = NodeAtWork(
                        unique_id=node.unique_id,
                        resource_type=node.resource_type,
                        name=node.name,
                        started_at=event.time,
                    )
            case NodeFinished():
                self._node_finished(run, event)
            case _:
                pass

    def _node_finished(self, run: _Run, event: NodeFinished) -> None:
        if event.node.resource_type != "operation":  # hooks are not planned
            run.done += 1
            run.by_status[event.status] += 1
        if event.started_at is not None or event.node.unique_id in run.nodes:
            run.running = max(0, run.running - 1)
        run.nodes.pop(event.node.unique_id, None)
        if event.status in BAD:
            self._fail(event.event_id, _failure_of_node(event))

    def _finished(self, event: RunFinished) -> None:
        run = self._runs.get(event.run_id)
        error = event.error.message if event.error else None
        self._end(
            EndedRow(
                run_id=event.run_id,
                project=event.project,
                target=event.target,
                status=event.status,
                args=run.now.args if run else [],
                finished_at=event.time,
                elapsed_s=event.elapsed_s,
                exit_code=event.exit_code,
                error=error,
            )
        )
        if error is not None:
            self._fail(event.run_id, _failure_of_run(self._ended[event.run_id]))

    def _end(self, row: EndedRow) -> None:
        self._runs.pop(row.run_id, None)
        if row.run_id not in self._gone:
            self._gone.append(row.run_id)
        known = self._ended.get(row.run_id)
        if known is None or not known.args:
            self._ended[row.run_id] = row
        if len(self._ended) > MAX_ENDED:
            del self._ended[min(self._ended, key=lambda one: self._ended[one].finished_at)]

    def _fail(self, key: str, row: FailureRow) -> None:
        self._failures[key] = row
        if len(self._failures) > MAX_FAILURES:
            del self._failures[min(self._failures, key=lambda one: self._failures[one].at)]

    def _covers(self, project: str, target: str) -> bool:
        return self._project in (None, project) and self._target in (None, target)

    # What is seen

    def view(self, now: datetime) -> FleetView:
        return FleetView(
            at=now,
            workers=[self._worker_row(self._workers[key], now) for key in sorted(self._workers)],
            queues=sorted(self._queue_rows(now), key=lambda row: (-row.waiting, row.project)),
            runs=[_run_row(self._runs[run_id], now) for run_id in sorted(self._runs)],
            ended=sorted(self._ended.values(), key=lambda row: row.finished_at, reverse=True),
            failures=sorted(self._failures.values(), key=lambda row: row.at, reverse=True),
            events_per_s=None if self._rate is None else self._rate.per_s(now),
        )

    def _worker_row(self, worker: _Worker, now: datetime) -> WorkerRow:
        status = worker.status
        silent_s = (now - worker.answered_at).total_seconds() if worker.silent else None
        return WorkerRow(
            worker=status.worker,
            version=status.version,
            host=status.host,
            started_at=status.started_at,
            slots=status.slots,
            used=status.used,
            draining=status.draining,
            silent_s=silent_s,
            projects=status.projects,
            run_ids=sorted(run.run_id for run in status.runs),
        )

    def _queue_rows(self, now: datetime) -> Iterable[QueueRow]:
        at_work = {(run.now.project, run.now.target): run_id for run_id, run in self._runs.items()}
        for place, waiting in self._waiting.items():
            project, _, target = place.partition(".")
            if not waiting or not self._covers(project, target):
                continue
            since = self._waiting_since.get(place)
            yield QueueRow(
                project=project,
                target=target,
                waiting=waiting,
                since=since,
                oldest_wait_s=None if since is None else _seconds(since, now),
                running=at_work.get((project, target)),
            )


def _run_row(run: _Run, now: datetime) -> RunRow:
    told = run.now
    return RunRow(
        run_id=told.run_id,
        project=told.project,
        target=told.target,
        status=told.status,
        args=told.args,
        worker=run.worker,
        attempt=told.attempt,
        queued_at=told.queued_at,
        started_at=told.started_at,
        elapsed_s=None if told.started_at is None else _seconds(told.started_at, now),
        done=run.done,
        total=None if told.total is None else max(told.total, run.done),
        by_status=dict(run.by_status),
        running=max(run.running, len(run.nodes)),
        nodes=sorted(run.nodes.values(), key=lambda node: node.started_at),
        eta_s=told.eta_s,
        cancel=run.cancel,
        unstored=told.unstored,
    )


def _at_work(view: RunView) -> RunAtWork:
    return RunAtWork(
        run_id=view.run_id,
        project=view.project,
        target=view.target,
        status=view.status,
        args=view.args,
        attempt=view.attempt,
        queued_at=view.queued_at,
        started_at=view.started_at,
    )


def _ended_row(view: RunView, at: datetime) -> EndedRow:
    finished_at = view.finished_at or view.updated_at or at
    return EndedRow(
        run_id=view.run_id,
        project=view.project,
        target=view.target,
        status=view.status,
        args=view.args,
        finished_at=finished_at,
        elapsed_s=_seconds(view.started_at, finished_at) if view.started_at else None,
        exit_code=view.exit_code,
        error=view.error,
    )


def _failure_of_run(row: EndedRow) -> FailureRow:
    return FailureRow(
        at=row.finished_at,
        project=row.project,
        target=row.target,
        run_id=row.run_id,
        status=row.status,
        message=_cut(row.error),
    )


def _failure_of_rejection(event: RunRejected) -> FailureRow:
    return FailureRow(
        at=event.time,
        project=event.project,
        target=event.target,
        run_id=event.run_id,
        status="rejected",
        message=_cut(f"{event.code}: {event.message}"),
    )


def _failure_of_node(event: NodeFinished) -> FailureRow:
    return FailureRow(
        at=event.time,
        project=event.project,
        target=event.target,
        run_id=event.run_id,
        status=event.status,
        unique_id=event.node.unique_id,
        resource_type=event.node.resource_type,
        name=event.node.name,
        message=_cut(message_of(event)),
    )


def _cut(message: str | None) -> str | None:
    return message[:MAX_MESSAGE_CHARS] if message else message


def _seconds(since: datetime, until: datetime) -> float:
    """The worker's clock may be ahead of ours."""
    return max(0.0, round((until - since).total_seconds(), 3))
