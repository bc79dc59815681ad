"""Requests under subjects that no worker serves: found, rejected, kept in DBT_DEAD.

Such a request has no consumer, so nobody would ever see it. A subject is known when some
worker has made its durable consumer (see `consumer`); one that stays without for GRACE_S is
not about to be served by a worker that is still starting, and its requests are rejected.
"""

import logging
import time

import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig

from dbtstream.config import Config
from dbtstream.consumer import durable_name
from dbtstream.errors import RequestRejected
from dbtstream.execution import Services
from dbtstream.lease import RequestLease
from dbtstream.messages import RejectCode
from dbtstream.nats_link import NatsLink
from dbtstream.rejection import reject
from dbtstream.subjects import (
    H_RUN_ID,
    NAME,
    RUNS,
    RUNS_STREAM,
    is_run_id,
    run_id_of_request,
    runs_subject,
    token,
)

logger = logging.getLogger(__name__)

GRACE_S = 5.0
BATCH = 50
IDLE_S = 30.0


class UnknownSubjects:
    """Looks through DBT_RUNS for subjects without a consumer."""

    def __init__(self, link: NatsLink, config: Config, services: Services) -> None:
        self._link = link
        self._config = config
        self._services = services
        self._served = {
            runs_subject(name, target)
            for name, project in config.projects.items()
            for target in project.targets
        }
        self._first_seen: dict[str, float] = {}

    async def sweep(self) -> list[str]:
        """Reject what has been unknown for long enough; the codes given. Raises NatsError."""
        unknown = [
            subject
            for subject in await self._waiting()
            if subject not in self._served and not await self._has_consumer(subject)
        ]
        now = time.monotonic()
        self._first_seen = {s: self._first_seen.get(s, now) for s in unknown}
        codes: list[str] = []
        for subject, since in self._first_seen.items():
            if now - since >= GRACE_S:
                codes += await self._reject_all(subject)
        return codes

    async def _waiting(self) -> list[str]:
        with self._link.translated("looking through DBT_RUNS"):
            info = await self._link.js.stream_info(RUNS_STREAM, subjects_filter=f"{RUNS}.>")
        return list(info.state.subjects or {})

    async def _has_consumer(self, subject: str) -> bool:
        with self._link.translated(f"looking for the consumer of {subject}"):
            try:
                await self._link.js.consumer_info(RUNS_STREAM, durable_name(subject))
            except nats.js.errors.NotFoundError:
                return False
        return True

    async def _reject_all(self, subject: str) -> list[str]:
        rejected = self._why(subject)
        name = "unknown_" + durable_name(subject)
        with self._link.translated(f"taking what waits under {subject}"):
            await self._link.js.add_consumer(
                RUNS_STREAM,
                ConsumerConfig(
                    name=name,
                    durable_name=name,
                    filter_subject=subject,
                    ack_policy=AckPolicy.EXPLICIT,
                    ack_wait=self._config.worker.ack_wait_s,
                    inactive_threshold=IDLE_S,
                ),
            )
            pulls = await self._link.js.pull_subscribe_bind(name, stream=RUNS_STREAM)
            try:
                messages = await pulls.fetch(BATCH, timeout=self._config.nats.request_timeout_s)
            except nats.errors.TimeoutError:
                messages = []
            finally:
                await pulls.unsubscribe()
        for message in messages:
            lease = RequestLease(self._link, message, heartbeat_s=self._config.worker.heartbeat_s)
            given = lease.headers.get(H_RUN_ID, "")
            run_id = (
                given if is_run_id(given) else run_id_of_request(lease.stream_seq, lease.stored_at)
            )
            project, target = _names(subject)
            await reject(self._services, lease, run_id, project, target, rejected)
            await lease.term()
        with self._link.translated(f"leaving {subject}"):
            await self._link.js.delete_consumer(RUNS_STREAM, name)
        return [rejected.code] * len(messages)

    def _why(self, subject: str) -> RequestRejected:
        project, target = _names(subject)
        if subject.count(".") != RUNS.count(".") + 2 or not NAME.fullmatch(project):
            return RequestRejected(
                RejectCode.BAD_MESSAGE, f"{subject} is not {RUNS}.<project>.<target>", "subject"
            )
        known = self._config.projects.get(project)
        if known is not None:
            return RequestRejected(
                RejectCode.UNKNOWN_TARGET,
                f"project {project} has no target {target}; it has {', '.join(known.targets)}",
                "subject",
            )
        return RequestRejected(
            RejectCode.UNKNOWN_PROJECT,
            f"no worker serves project {project}; this one serves "
            f"{', '.join(self._config.projects) or 'none'}",
            "subject",
        )


def _names(subject: str) -> tuple[str, str]:
    """Project and target of a subject under `dbt.runs`, `_` where it has none."""
    tokens = subject.removeprefix(f"{RUNS}.").split(".")
    return token(tokens[0]), token(tokens[1]) if len(tokens) > 1 else "_"
