"""One lease on a target, and on places under limits: renewed while dbt runs, then given up.

`run_lease` takes it. It tells dbt's process with each renewal how long it may go on
(`on_deadline`), so that the child is gone before the lease can be.

**Why no two children overlap.** A renewal that leaves us at time t makes the key live to t + TTL
at least, and tells the child to stop dbt at t + 0.7 TTL and to kill itself at t + 0.85 TTL.
Nobody else can write the key before it has expired, or we have deleted it. No clock but ours
and the length of a second counts.

**Except when nobody can get in.** dbt should not die of a restart of NATS. With cut_off = "auto",
as long as renewals fail and every server that we know of refuses TCP connections, the child may
go on for 0.33 TTL from the last refusal, whatever has become of the key. Whoever finds a key
that has expired (`Vacancy.ABSENT`), with a run on it unfinished, takes it only over a connection
that has lasted for `settle_s`, a little more than 0.33 TTL: its server has been running, and
accepting, for all of that time, so our last refusal was before it, and our child is dead.

This holds if all workers have the same TTL, and if we know all servers: those of the config and
those that they announce, which is their cluster. Not known are leaf nodes and the other clusters
of a supercluster; nor may something on the way refuse in a server's place, as a Kubernetes
service without endpoints does. A server in lame duck mode refuses while it still has clients,
but puts down JetStream first (2.15.1). cut_off = "stop" needs no such assumption; cut_off =
"go_on" is for those who have one worker only.

A holder that was away longer than its TTL takes its key again if nobody has had it. If somebody
had, and left no trace, this cannot be seen here: the events' stream and the run's state, both
of which refuse an older `fence`, are the last line.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple, Self

from dbtstream.errors import LeaseLost, NatsError
from dbtstream.frames import clock_s
from dbtstream.kv_bucket import Bucket, RevisionConflict
from dbtstream.lease_keys import (
    Held,
    Vacancy,
    encode_held,
    held_of,
    limit_key,
    used_key,
    vacancy_of,
)
from dbtstream.nats_link import NatsLink
from dbtstream.streams import LEASES_BUCKET

logger = logging.getLogger(__name__)

STOP_AT = 0.7
KILL_AT = 0.85
"""Parts of the TTL after a renewal; dbt has the time between them to stop cleanly."""

REFUSED_STOP_AT = 0.25
REFUSED_KILL_AT = 0.33
"""The same after a moment at which no server was there; below `settle_s`."""

RETRY_FOR_S = 10.0
GIVE_UP_S = 5.0  # for all keys at the end; what is not given up by then expires
USED_TTL_S = 30 * 86400  # longer than any run

CutOff = Literal["auto", "stop", "go_on"]
DeadlineCallback = Callable[[float, float], None]


def settle_s(ttl_s: float) -> float:
    """How long to have been connected before taking over a run whose lease has expired.

    Two reasons: a holder that NATS was away from needs a moment to take its key again; and a
    child that goes on while no server is there (see above) has 0.33 TTL from the last moment
    of that. The second on top is for its killing.
    """
    return ttl_s / 3 + 1


@dataclass(slots=True)
class Key:
    """What we know of one key of ours."""

    revision: int
    renewed_at: float  # clock_s before the write that is known to be stored
    unanswered_since: float | None = None  # likewise, of writes that may be


class Terms(NamedTuple):
    ttl_s: int
    renew_s: float
    cut_off: CutOff

    @property
    def retry_s(self) -> float:
        return min(1.0, self.ttl_s / 20)

    @property
    def try_s(self) -> float:
        """A frozen server must not keep a try until the deadline, which it could still move."""
        return self.ttl_s / 3


class RunLease:
    """An async context manager: renewed inside it, given up at its end. One run's dbt must be
    gone by then. See `Leases.acquire_target`."""

    def __init__(self, link: NatsLink, terms: Terms, target: str, held: Held, taken: Key) -> None:
        self.fence = taken.revision
        """The revision of the target's key when it was acquired. Greater for each holder."""
        self.token = held.token
        self.lost: asyncio.Future[LeaseLost] = asyncio.get_running_loop().create_future()
        """Done when a key is somebody else's: dbt must end here."""
        self._link = link
        self._terms = terms
        self._target = target
        self._data = encode_held(held)
        self._keys = {target: taken}
        self._once = Bucket(link, LEASES_BUCKET, retry_for_s=0)
        self._patient = Bucket(link, LEASES_BUCKET, retry_for_s=RETRY_FOR_S)
        self._renewing = asyncio.Lock()
        self._moved_on = (0.0, 0.0)  # deadlines that no renewal has given
        self._callback: DeadlineCallback | None = None
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    # -- for its life ------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._keep(), name=f"lease {self._target}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled() and (crash := self._task.exception()):
                logger.error(
                    "the renewal of a lease died", exc_info=crash, extra=self._said("lease.crash")
                )
        await self._give_up(self._keys)

    @property
    def keys(self) -> list[str]:
        return list(self._keys)

    @property
    def stop_at(self) -> float:
        """`frames.clock_s` at which dbt is to stop, unless a renewal comes before."""
        renewed_at = min(key.renewed_at for key in self._keys.values())
        return max(renewed_at + STOP_AT * self._terms.ttl_s, self._moved_on[0])

    @property
    def kill_at(self) -> float:
        """Likewise, at which none of its processes may be left."""
        renewed_at = min(key.renewed_at for key in self._keys.values())
        return max(renewed_at + KILL_AT * self._terms.ttl_s, self._moved_on[1])

    @property
    def expired(self) -> bool:
        """The child is gone by now, of itself. The lease may be had again nevertheless."""
        return clock_s() > self.kill_at

    def on_deadline(self, callback: DeadlineCallback | None) -> None:
        """Have it called with `stop_at` and `kill_at`, now and whenever they have moved."""
        self._callback = callback
        self._tell_deadline()

    async def take_limits(self, limits: Mapping[str, int]) -> bool:
        """One place under each of these names, which have so many; all or none, tried once.

        False: one is full, or its holder vanished and our connection is too young to know that
        its child is dead (`settle_s`). In sorted order, so that of two runs that want the same,
        one gets all. Raises NatsError.
        """
        taken: dict[str, Key] = {}
        try:
            for name, places in sorted(limits.items()):
                place = await self._take_place(name, places)
                if place is None:
                    break
                taken[place[0]] = place[1]
            else:
                self._keys |= taken
                return True
        except NatsError:
            await self._give_up(taken)
            raise
        await self._give_up(taken)
        return False

    async def confirm(self) -> bool:
        """Whether the target's key is ours right now: it is renewed. Raises NatsError."""
        if self.lost.done():
            return False
        try:
            async with self._renewing:
                await self._renew(self._target, self._patient)
        except LeaseLost as lost:
            self._lose(lost)
            return False
        self._tell_deadline()
        return True

    # -- renewing ----------------------------------------------------------------------------

    async def _keep(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._terms.renew_s)
                while not await self._renewed():
                    await self._move_on()
                    await asyncio.sleep(self._terms.retry_s)
        except LeaseLost as lost:
            self._lose(lost)

    async def _renewed(self) -> bool:
        """All keys. Raises LeaseLost."""
        try:
            async with asyncio.timeout(self._terms.try_s), self._renewing:
                for key in self.keys:
                    await self._renew(key, self._once)
        except (NatsError, TimeoutError) as error:
            if not self._failing:
                logger.warning(
                    "lease not renewed, trying again",
                    extra=self._said("lease.not_renewed", error=str(error) or "no answer"),
                )
            self._failing = True
            return False
        if self._failing:
            logger.info("lease renewed again", extra=self._said("lease.renewed"))
        self._failing = False
        self._tell_deadline()
        return True

    async def _renew(self, name: str, bucket: Bucket) -> None:
        """Over the revision that we know. Raises LeaseLost, NatsError.

        The write before may have been stored without an answer. Then it, and not this one, may
        be what counts now, from the time when it was sent; and another write makes that clear.
        """
        key = self._keys[name]
        first, sent = key.unanswered_since, clock_s()
        key.unanswered_since = sent if first is None else first
        try:
            revision = await bucket.write(name, self._data, key.revision, ttl_s=self._terms.ttl_s)
        except RevisionConflict:
            revision = await self._write_anew(name, bucket)
        key.revision, key.renewed_at = revision, key.unanswered_since
        key.unanswered_since = None
        if first is not None:
            await self._renew(name, bucket)

    async def _write_anew(self, name: str, bucket: Bucket) -> int:
        """When ours is not the last revision: nobody's, another's, or the server has lost some."""
        value = await bucket.read(name)
        if value is not None and value.data == self._data:
            return await bucket.write(name, self._data, value.revision, ttl_s=self._terms.ttl_s)
        if vacancy_of(value) is not Vacancy.ABSENT:
            held = held_of(value)
            raise LeaseLost(name, held.worker if held else None)
        revision = await bucket.write(name, self._data, 0, ttl_s=self._terms.ttl_s)
        logger.warning(
            "lease had expired, taken again",
            extra=self._said("lease.taken_again", key=name),
        )
        return revision

    async def _move_on(self) -> None:
        """Let dbt go on without a renewal, where that is allowed."""
        now, ttl_s = clock_s(), self._terms.ttl_s
        match self._terms.cut_off:
            case "stop":
                return
            case "go_on":
                moved = (now + STOP_AT * ttl_s, now + KILL_AT * ttl_s)
            case "auto":
                if not await self._link.refused_everywhere(self._terms.retry_s):
                    return
                moved = (now + REFUSED_STOP_AT * ttl_s, now + REFUSED_KILL_AT * ttl_s)
        before = (self.stop_at, self.kill_at)
        self._moved_on = moved
        if (self.stop_at, self.kill_at) != before:
            self._tell_deadline()

    def _tell_deadline(self) -> None:
        if self._callback is not None:
            self._callback(self.stop_at, self.kill_at)

    def _lose(self, lost: LeaseLost) -> None:
        if not self.lost.done():
            logger.error(str(lost), extra=self._said("lease.lost", key=lost.key))
            self.lost.set_result(lost)

    # -- taking and giving up ----------------------------------------------------------------

    async def _take_place(self, name: str, places: int) -> tuple[str, Key] | None:
        for place in range(places):
            key = limit_key(name, place)
            value = await self._patient.read(key)
            ours = value is not None and value.data == self._data  # a try without an answer
            if not ours and not await self._may_take(key, vacancy_of(value)):
                continue
            await self._patient.write(used_key(key), b"", None, ttl_s=USED_TTL_S)
            sent, over = clock_s(), value.revision if value else 0
            try:
                revision = await self._patient.write(key, self._data, over, ttl_s=self._terms.ttl_s)
            except RevisionConflict:
                continue
            return key, Key(revision, sent)
        return None

    async def _may_take(self, place: str, vacancy: Vacancy) -> bool:
        """Where one has expired, a child may still be going on, see at the top."""
        if vacancy is Vacancy.ABSENT and not self._settled():
            return await self._patient.read(used_key(place)) is None
        return vacancy is not Vacancy.HELD

    def _settled(self) -> bool:
        since = self._link.connected_since
        now = asyncio.get_running_loop().time()
        return since is not None and now - since >= settle_s(self._terms.ttl_s)

    async def _give_up(self, keys: dict[str, Key]) -> None:
        """What cannot be given up in time expires."""
        try:
            async with asyncio.timeout(GIVE_UP_S):
                for name, key in reversed(list(keys.items())):
                    try:
                        await self._patient.delete(name, key.revision)
                    except RevisionConflict:
                        await release(self._patient, name, self.token)  # a renewal came between
        except (NatsError, TimeoutError) as error:
            logger.warning(
                "lease not given up, it will expire",
                extra=self._said("lease.not_given_up", error=str(error)),
            )

    def _said(self, action: str, **facts: object) -> dict[str, object]:
        return {"action": action, "key": self._target, "fence": self.fence, **facts}


async def release(bucket: Bucket, key: str, token: str) -> bool:
    value = await bucket.read(key)
    held = held_of(value)
    if value is None or held is None or held.token != token:
        return False
    try:
        await bucket.delete(key, value.revision)
    except RevisionConflict:
        return False
    return True
