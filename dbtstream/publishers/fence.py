"""Whose events the stream may still take: a lease's hold on its project and target there.

A lease alone cannot keep a worker that was frozen from waking up and publishing what it still
has. So each lease begins with a `run.leased` event on one subject per project and target
(`subjects.leased_subject`), and every event after it is published on the condition that this
subject's last message is still ours (`Nats-Expected-Last-Subject-Sequence-Subject`). The server
checks; whoever takes over publishes a `run.leased` of its own, and from then on what comes from
the old lease is refused (10071). The condition on one literal subject costs the server some
20 us per message; on all subjects of the target it would be 500 (nats-server 2.15.1).
"""

from dataclasses import dataclass

from dbtstream.errors import Superseded
from dbtstream.nats_link import NatsLink
from dbtstream.stored_message import last_stored
from dbtstream.subjects import EVENTS, EVENTS_STREAM, H_FENCE, H_RUN_ID, leased_subject

H_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
H_EXPECTED_SUBJECT = "Nats-Expected-Last-Subject-Sequence-Subject"


@dataclass(frozen=True, slots=True)
class Leased:
    """The last `run.leased` of a project and target; all zero where there is none."""

    seq: int = 0
    run_id: str = ""
    fence: int = 0


class EventFence:
    """One lease's right to publish. `number` is the `fence` of its events."""

    def __init__(
        self, project: str, target: str, run_id: str, number: int, before: Leased | None
    ) -> None:
        self.project, self.target = project, target
        self.subject = leased_subject(project, target)
        self.run_id, self.number = run_id, number
        self._before = before  # None: not looked up yet
        self._own: int | None = None  # the sequence of our run.leased, once it is stored

    @classmethod
    async def take(
        cls, link: NatsLink, project: str, target: str, run_id: str, revision: int
    ) -> "EventFence":
        """For a lease that was just got. Raises NatsError.

        The number is the lease's revision, unless the stream has seen a higher one, which
        happens only when the bucket of leases was made anew.
        """
        last = await last_leased(link, project, target)
        return cls(project, target, run_id, max(revision, last.fence + 1), last)

    @classmethod
    def of_headers(cls, subject: str, headers: dict[str, str]) -> "EventFence":
        """For the events that a dead process left in its outbox."""
        project, target = subject.split(".")[2:4]
        return cls(project, target, headers[H_RUN_ID], int(headers.get(H_FENCE, "0")), None)

    @property
    def is_up(self) -> bool:
        """Our `run.leased` is stored: what comes after it may be sent many at once."""
        return self._own is not None

    def headers(self) -> dict[str, str]:
        """The condition for the next message, or for the first one of a batch."""
        before = self._before.seq if self._before is not None else 0
        expected = before if self._own is None else self._own
        return {H_EXPECTED_SUBJECT: self.subject, H_EXPECTED: str(expected)}

    def headers_if_last(self, last_of_target: int) -> dict[str, str]:
        """The condition that the target has had no event at all since the one of this sequence."""
        every = f"{EVENTS}.{self.project}.{self.target}.>"
        return {H_EXPECTED_SUBJECT: every, H_EXPECTED: str(last_of_target)}

    def stored(self, subject: str, seq: int) -> None:
        """A message of ours is in the stream."""
        if subject == self.subject:
            self._own = seq

    async def look(self, link: NatsLink) -> None:
        """Read how things stand. Raises Superseded when the target is somebody else's now."""
        last = await last_leased(link, self.project, self.target)
        if (last.run_id, last.fence) == (self.run_id, self.number):
            self._own = last.seq
        elif last.seq and last.fence >= self.number:
            by = "the same run" if last.run_id == self.run_id else f"run {last.run_id}"
            raise Superseded(self.run_id, self.number, f"fence {last.fence} of {by} follows")
        elif last.seq == 0 and self._own is not None:
            self._own = 0  # aged out of the stream; nobody came after us
        else:
            self._before = last


async def last_leased(link: NatsLink, project: str, target: str) -> Leased:
    """From the stream's leader. Raises NatsError."""
    found = await last_stored(link, EVENTS_STREAM, leased_subject(project, target))
    if found is None:
        return Leased()
    headers = found.headers
    return Leased(found.stream_seq, headers.get(H_RUN_ID, ""), int(headers.get(H_FENCE, "0")))


async def last_of_target(link: NatsLink, project: str, target: str) -> int:
    """The sequence of the target's last event of any kind; 0 where there is none."""
    found = await last_stored(link, EVENTS_STREAM, f"{EVENTS}.{project}.{target}.>")
    return 0 if found is None else found.stream_seq
