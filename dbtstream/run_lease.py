"""Who may run dbt on a target, by leases in the KV bucket `dbt_leases`: taking and looking.

`lease_keys` has the keys and values; `lease_renewal` keeps what is taken here, and says why no two
dbt processes ever overlap. Not `lease`: that is our hold on a request in the queue. `worker`
takes a lease, and `execution` runs dbt under it.
"""

import secrets

from dbtstream.frames import clock_s
from dbtstream.kv_bucket import Bucket, RevisionConflict
from dbtstream.lease_keys import Held, Vacancy, encode_held, held_of, target_key, vacancy_of
from dbtstream.lease_renewal import RETRY_FOR_S, CutOff, Key, RunLease, Terms, release, settle_s
from dbtstream.nats_link import NatsLink
from dbtstream.streams import LEASES_BUCKET

__all__ = ["CutOff", "Held", "Leases", "RunLease", "Vacancy", "settle_s"]


class Leases:
    """Those of one worker."""

    def __init__(
        self, link: NatsLink, *, worker: str, ttl_s: int, renew_s: float, cut_off: CutOff = "auto"
    ) -> None:
        self._link = link
        self._worker = worker
        self._terms = Terms(ttl_s, renew_s, cut_off)
        self._bucket = Bucket(link, LEASES_BUCKET, retry_for_s=RETRY_FOR_S)
        self._unanswered: dict[str, Held] = {}

    async def acquire_target(self, project: str, target: str, run_id: str) -> "RunLease | None":
        """None: another one holds it. Enter the lease at once. Raises NatsError.

        After a NatsError the lease may be ours all the same; the next try for this run finds
        it by its token.
        """
        key = target_key(project, target)
        held = self._unanswered.get(key)
        tried = held is not None and held.run_id == run_id
        if held is None or not tried:
            held = Held(worker=self._worker, run_id=run_id, token=secrets.token_hex(8))
            self._unanswered[key] = held
        data = encode_held(held)
        try:
            sent = clock_s()
            revision = await self._bucket.write(key, data, 0, ttl_s=self._terms.ttl_s)
            if tried:  # what is there may be of the try before, and so be over sooner
                sent = clock_s()
                revision = await self._bucket.write(key, data, revision, ttl_s=self._terms.ttl_s)
        except RevisionConflict:
            self._unanswered.pop(key, None)
            return None
        self._unanswered.pop(key, None)
        return RunLease(self._link, self._terms, key, held, Key(revision, sent))

    async def holder(self, project: str, target: str) -> Held | None:
        """Raises NatsError."""
        return held_of(await self._bucket.read(target_key(project, target)))

    async def vacancy(self, project: str, target: str) -> Vacancy:
        """Raises NatsError."""
        return vacancy_of(await self._bucket.read(target_key(project, target)))

    async def release_of(self, key: str, token: str) -> bool:
        """Give up a lease of a dead predecessor; False if it is not that token's any more.

        Raises NatsError.
        """
        return await release(self._bucket, key, token)
