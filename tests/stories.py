"""Invented frames: a run of dbt, told step by step to a Normalizer.

A `Story` numbers and times the frames as the child does, and keeps the events. What it tells
follows the order of dbt's events; recorded ones are in `unit/frames`.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec

from dbtstream import frames
from dbtstream.endings import Ended, Ending
from dbtstream.envelope import RunContext
from dbtstream.event_base import Event, Relation
from dbtstream.events import AnyEvent, NodeFinished, NodeStarted, RunFinished, TestBlock, event_type
from dbtstream.normalizer import Normalizer
from dbtstream.statuses import Reason
from tests.guarantees import check_run

BEGIN = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
RUN_ID = "0195512b-8a00-7000-8000-000000000001"

E = TypeVar("E", bound=Event)


def context(**changes: Any) -> RunContext:
    facts: dict[str, Any] = {
        "project": "shop",
        "target": "prod",
        "run_id": RUN_ID,
        "attempt": 1,
        "fence": 7,
        "worker": "w1",
        "host": "host-1",
        "args": ["build"],
        "command": "build",
        "queued_at": BEGIN,
    }
    return RunContext(**(facts | changes))


def node(unique_id: str, *upstream: str, **fields: Any) -> frames.PlannedNode:
    """As the manifest has it: `node("model.shop.daily", "model.shop.orders")`."""
    resource_type, package, name, *_ = unique_id.split(".")
    facts: dict[str, Any] = {
        "unique_id": unique_id,
        "resource_type": resource_type,
        "name": name,
        "package_name": package,
        "materialized": "view" if resource_type == "model" else resource_type,
        "upstream": list(upstream),
    }
    if resource_type == "test":
        facts["test"] = TestBlock(attached_node=upstream[0] if upstream else None)
    else:
        facts["relation"] = Relation(database="db", schema="main", identifier=name)
    return frames.PlannedNode(**(facts | fields))


class Story:
    """One attempt. Each method tells what dbt does next."""

    def __init__(self, **changes: Any) -> None:
        self.normalizer = Normalizer(context(**changes))
        self.events: list[AnyEvent] = []
        self.now = BEGIN + timedelta(seconds=2)
        self._n = 0
        self._started_at: dict[str, str] = {}
        self._results: dict[str, frames.NodeResult] = {}
        self._ephemeral: set[str] = set()
        self.normalizer.spawned(self.now)

    # What happened

    def end_of(self, unique_id: str) -> NodeFinished:
        (event,) = [e for e in self.ends() if e.node.unique_id == unique_id]
        return event

    def all(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def ends(self) -> list[NodeFinished]:
        return self.all(NodeFinished)

    def start_of(self, unique_id: str) -> NodeStarted | None:
        starts = [e for e in self.all(NodeStarted) if e.node.unique_id == unique_id]
        return starts[0] if starts else None

    def statuses(self) -> dict[str, str]:
        """name -> `status` or `status/reason`."""
        return {
            e.node.name: f"{e.status}/{e.reason}" if e.reason else str(e.status)
            for e in self.ends()
        }

    def kinds(self) -> list[str]:
        return [event_type(event) for event in self.events]

    @property
    def finished(self) -> RunFinished:
        (event,) = self.all(RunFinished)
        assert event is self.events[-1]
        return event

    # Telling

    def tell(self, kind: type[frames.Frame], /, **fields: Any) -> list[AnyEvent]:
        """The next frame, a tenth of a second later. Returns its events."""
        self.now += timedelta(seconds=0.1)
        self._n += 1
        frame: Any = kind(n=self._n, at=self.now.timestamp(), **fields)
        made = self.normalizer.frame(frames.decode_frame(msgspec.json.encode(frame)))
        self.events += made
        return made

    def hello(self) -> "Story":
        self.tell(
            frames.Hello,
            protocol=frames.PROTOCOL,
            pid=4711,
            python_version="3.11.7",
            dbt_version="1.11.16",
            adapter_type="duckdb",
            adapter_version="1.11.1",
        )
        self.tell(frames.Invocation, invocation_id="8317a821-dee1-4702-a582-11bab356968d")
        return self

    def plan(
        self,
        *nodes: frames.PlannedNode,
        others: tuple[frames.PlannedNode, ...] = (),
        status: str = "complete",
    ) -> "Story":
        """Hello and the plan, the nodes in chunks of two."""
        self.hello()
        for i in range(0, len(nodes), 2):
            self.tell(frames.Nodes, nodes=list(nodes[i : i + 2]))
        self._ephemeral = {n.unique_id for n in nodes if n.materialized == "ephemeral"}
        self.tell(frames.Plan, node_count=len(nodes), status=status, others=list(others))
        return self

    def open(self, unique_id: str, thread: str = "Thread-1 (worker)") -> None:
        """NodeStart alone: what dbt fires for skipped nodes and batches, too."""
        started_at = self.now.replace(tzinfo=None).isoformat()
        self._started_at.setdefault(unique_id, started_at)
        self.tell(frames.NodeStart, unique_id=unique_id, thread=thread, started_at=started_at)

    def start(self, unique_id: str, thread: str = "Thread-1 (worker)") -> None:
        self.open(unique_id, thread)
        self.tell(frames.NodeWork, unique_id=unique_id, index=1, total=1)

    def finish(self, unique_id: str, status: str = "success", **fields: Any) -> None:
        facts: dict[str, Any] = {
            "unique_id": unique_id,
            "status": status,
            "thread": "Thread-1 (worker)",
            "started_at": self._started_at.get(unique_id),
            "finished_at": None if status == "skipped" else self._iso(),
        }
        facts |= fields
        self.tell(frames.NodeFinish, **facts)
        if unique_id not in self._ephemeral:
            self.returns(unique_id, status, message=facts.get("message"))

    def run(self, unique_id: str, status: str = "success", **fields: Any) -> None:
        self.start(unique_id)
        self.finish(unique_id, status, **fields)

    def fail(self, unique_id: str, message: str = "Database Error in model x\n  no") -> None:
        self.start(unique_id)
        self.error(unique_id, message)
        self.finish(unique_id, "error", message=message)

    def error(self, unique_id: str, message: str, error_class: str = "DbtDatabaseError") -> None:
        self.tell(
            frames.NodeError,
            unique_id=unique_id,
            error_class=error_class,
            message=message,
            code="10003",
        )

    def skip(self, unique_id: str) -> None:
        self.open(unique_id)
        self.tell(frames.NodeSkip, unique_id=unique_id)
        self.finish(unique_id, "skipped")

    def hook(self, unique_id: str, status: str = "success") -> None:
        if status != "skipped":
            self.tell(frames.HookStart, unique_id=unique_id, index=1, total=1)
        self.tell(frames.HookFinish, unique_id=unique_id, status=status, execution_s=0.1)
        self.returns(unique_id, status, message=f"{unique_id} {status}")

    def returns(self, unique_id: str, status: str, **fields: Any) -> None:
        """dbt's result object will have this of the node."""
        self._results[unique_id] = frames.NodeResult(unique_id=unique_id, status=status, **fields)

    def result(
        self,
        exit_code: int = 0,
        *,
        error: frames.ErrorInfo | None = None,
        interrupted: bool = False,
        stats: frames.ChildStats | None = None,
    ) -> None:
        """invoke returns. With an exception it returns no results."""
        count = -1
        if error is None and not interrupted:
            results = list(self._results.values())
            count = len(results)
            for i in range(0, count, 2):
                self.tell(frames.Results, results=results[i : i + 2])
        self.tell(
            frames.Result,
            success=exit_code == 0,
            exit_code=exit_code,
            result_count=count,
            error=error,
            interrupted=interrupted,
            stats=stats or frames.ChildStats(),
        )

    def interrupt(self) -> None:
        """The answer to a cancel: KeyboardInterrupt comes out of invoke."""
        error = frames.ErrorInfo(error_class="KeyboardInterrupt", message="")
        self.result(2, error=error, interrupted=True)

    def cancel(self, stop: Reason = Reason.CANCELLED) -> None:
        """Requested by somebody, and the child interrupts dbt."""
        self.events += self.normalizer.cancel_step(
            "requested", at=self.now, by="ann", reason="wrong branch", stop=stop
        )
        self.tell(frames.Cancelling, by="control")

    # Ending

    def end(self, how: Ended = Ended.RESULT, *, final: bool = True, **fields: Any) -> None:
        """The child is gone. Whatever was told before, the guarantees hold."""
        self.now += timedelta(seconds=0.1)
        ending = Ending(how=how, **fields)
        self.events += self.normalizer.end(ending, at=self.now, final=final)
        check_run(
            self.events,
            first_seq=self.normalizer.context.first_seq,
            ordered=self.normalizer.context.command != "clone",
            complete=final,
        )

    def _iso(self) -> str:
        return self.now.replace(tzinfo=None).isoformat()
