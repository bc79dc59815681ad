"""The events of one attempt on their way out: numbered by `normalizer`, kept by `outbox`.

`execution` says what happened; this puts the events that come of it into the outbox, never
waiting, the ends of nodes into their KV states too, and what was dropped into `gap` events.
Each event is told to the observers of the run, once.
"""

import logging
from collections.abc import Iterable
from datetime import UTC, datetime

from dbtstream.endings import Ending
from dbtstream.events import AnyEvent, NodeFinished, RunFinished, encode_event
from dbtstream.normalizer import Normalizer
from dbtstream.observers import AttemptObserver
from dbtstream.outbox import Outbox, Record
from dbtstream.store import NodeStates
from dbtstream.subjects import event_headers, event_subject

logger = logging.getLogger(__name__)


class AttemptEvents:
    """`emit` while it runs, then `close_nodes` and `finish`, once each."""

    def __init__(
        self,
        normalizer: Normalizer,
        outbox: Outbox,
        node_states: NodeStates,
        observer: AttemptObserver,
        *,
        content_type: str,
        tracestate: str,
    ) -> None:
        self.verdict: RunFinished | None = None
        self.ended = False
        self._normalizer, self._outbox, self._node_states = normalizer, outbox, node_states
        self._content_type, self._tracestate = content_type, tracestate
        self._observer = observer

    def emit(self, events: Iterable[AnyEvent]) -> None:
        """Into the outbox, never waiting. What it had no room for is told in a gap."""
        for event in events:
            self._put(event, family=event.family)
        self._tell_drops()

    def close_nodes(self, ending: Ending) -> list[AnyEvent]:
        """The ends of what dbt left open."""
        self._tell_drops()
        events = self._normalizer.close_nodes(ending, at=_now())
        self._put_last(events)
        return events

    def finish(self, ending: Ending, *, final: bool) -> None:
        """After `close_nodes`; with `final` the run's own end is told, and is the `verdict`."""
        self._tell_drops()
        self.ended = True
        self._put_last(self._normalizer.finish(ending, at=_now(), final=final))

    def _put_last(self, events: Iterable[AnyEvent]) -> None:
        """Whatever their family, closing events are kept: no gap may follow them."""
        for event in events:
            self._put(event, family="run")

    def not_stored(self, record: Record, problem: str) -> None:
        """NATS will never take this event: its number is covered by a gap, if one may follow."""
        if not self.ended:
            self.emit(
                self._normalizer.gap(
                    record.family,
                    1,
                    f"refused by NATS: {problem}",
                    at=_now(),
                    from_seq=record.seq,
                    to_seq=record.seq,
                )
            )
        logger.error(
            "event refused by NATS and not stored",
            extra={
                "action": "event.refused",
                "run_id": self._normalizer.context.run_id,
                "seq": record.seq,
                "subject": record.subject,
                "problem": problem,
            },
        )

    def _tell_drops(self) -> None:
        for dropped in self._outbox.take_dropped():
            for event in self._normalizer.gap(
                dropped.family,
                dropped.count,
                "the outbox is full",
                at=_now(),
                from_seq=dropped.from_seq,
                to_seq=dropped.to_seq,
            ):
                self._put(event, family=event.family)

    def _put(self, event: AnyEvent, *, family: str) -> None:
        if isinstance(event, NodeFinished):
            self._node_states.put(event)
        elif isinstance(event, RunFinished):
            self.verdict = event
        command = self._normalizer.context.command or "_"
        self._outbox.put(
            Record(
                seq=event.seq,
                family=family,
                subject=event_subject(event, command=command),
                headers=event_headers(
                    event, content_type=self._content_type, tracestate=self._tracestate
                ),
                payload=encode_event(event, self._content_type),
            )
        )
        self._observer.take(event)


def _now() -> datetime:
    return datetime.now(UTC)
