"""One worker of the fleet does it: a key in the bucket `dbt_leases`, renewed while it leads.

For `openlineage`, whose messages are to go out in order and whose mapping has to see all events.
Unlike a run's lease (`lease_renewal`) nothing breaks if two lead for a moment: what is sent has
ids that follow from the events, so it is only sent twice. The key is `leader.<name>`.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

import msgspec

from dbtstream.errors import NatsError
from dbtstream.frames import clock_s
from dbtstream.kv_bucket import Bucket, RevisionConflict
from dbtstream.nats_link import NatsLink, backoff_s
from dbtstream.streams import LEASES_BUCKET

logger = logging.getLogger(__name__)

SURE = 0.7
"""Part of the TTL after a renewal for which nobody else can lead; the rest is for slow clocks."""

LOOK_S = 0.2
GIVE_UP_S = 2.0


class Leader(msgspec.Struct, frozen=True, kw_only=True):
    worker: str
    token: str  # new with each time that it leads


class Leadership:
    """`acquire`, then `keep` until it returns; `give_up` in any case."""

    def __init__(self, link: NatsLink, name: str, worker: str, *, ttl_s: int) -> None:
        self.key = f"leader.{name}"
        self._link = link
        self._worker = worker
        self._ttl_s = ttl_s
        self._bucket = Bucket(link, LEASES_BUCKET, retry_for_s=0)
        self._data = b""
        self._revision = 0
        self._renewed_at = 0.0

    @property
    def sure(self) -> bool:
        return clock_s() < self._renewed_at + SURE * self._ttl_s

    async def until_sure(self) -> None:
        """At once, as long as renewals come in."""
        while not self.sure:  # noqa: ASYNC110 - it is time that tells
            await asyncio.sleep(LOOK_S)

    async def acquire(self) -> None:
        """Until we lead, which may be never."""
        token = secrets.token_hex(8)
        self._data = msgspec.json.encode(Leader(worker=self._worker, token=token))
        failures = 0
        while True:
            await self._link.wait_connected()
            sent = clock_s()
            try:
                self._revision = await self._bucket.write(
                    self.key, self._data, 0, ttl_s=self._ttl_s
                )
            except RevisionConflict:
                failures = 0
                await asyncio.sleep(self._ttl_s / 4)
            except NatsError as error:
                failures += 1
                self._say("cannot ask for the lead yet", failures, error)
                await asyncio.sleep(backoff_s(failures))
            else:
                self._renewed_at = sent
                logger.info("leads", extra={"action": "leader.acquired", "key": self.key})
                return

    async def keep(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        """Renew, and each time do something; returns when another one leads. `meanwhile` must
        not raise."""
        failures = 0
        while True:
            await asyncio.sleep(self._ttl_s / 4 if failures == 0 else backoff_s(failures))
            sent = clock_s()
            try:
                self._revision = await self._bucket.write(
                    self.key, self._data, self._revision, ttl_s=self._ttl_s
                )
            except RevisionConflict:
                logger.warning("leads no more", extra={"action": "leader.lost", "key": self.key})
                return
            except NatsError as error:
                failures += 1
                self._say("the lead is not renewed, trying again", failures, error)
            else:
                failures, self._renewed_at = 0, sent
                await meanwhile()

    async def give_up(self) -> None:
        """So that another one need not wait for the key to expire. Best effort."""
        try:
            async with asyncio.timeout(GIVE_UP_S):
                await self._bucket.delete(self.key, self._revision)
        except (NatsError, TimeoutError):
            logger.debug("the lead will expire", extra={"action": "leader.left", "key": self.key})

    def _say(self, text: str, failures: int, error: NatsError) -> None:
        if failures == 1:
            extra = {"action": "leader.failed", "key": self.key, "error": str(error)}
            logger.warning(text, extra=extra)
