"""dbt's values as the contract's: times, timings, texts, adapter responses, node blocks. Pure.

Layer 1, used by `ledger` and `normalizer`. Whatever dbt or an adapter puts into a field that
is not of its documented form becomes null here and never an exception: an odd value must not
cost a node its terminal event.
"""

import math
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from dbtstream.event_base import MAX_TEXT_BYTES, ErrorBlock, FreshnessBlock, Relation
from dbtstream.events import BatchResults, NodeBlock
from dbtstream.frames import (
    BatchFinish,
    ErrorInfo,
    Freshness,
    HookFinish,
    NodeError,
    NodeFinish,
    NodeResult,
    PlannedNode,
    Timing,
)
from dbtstream.statuses import DBT_NODE_STATUS, NodeStatus

FAIL_FAST_MESSAGE = "Skipping due to fail_fast"
"""How dbt marks the results of nodes that --fail-fast left; they have no event (1.8 to 1.12)."""

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
_ERROR_HEAD = re.compile(r"([A-Z]\w*(?: \w+)* Error) in ")
_VERSION = re.compile(r"v\d+(?:_\d+)*")


class NodeEnd(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a node's end, from whichever frame told it first."""

    dbt_status: str | None = None
    message: str | None = None
    truncated: bool = False
    started_at: datetime | None = None
    finished_at: datetime | None = None
    compile_s: float | None = None
    execute_s: float | None = None
    failures: int | None = None
    adapter_response: dict[str, Any] = {}
    relation: Relation | None = None
    batch_results: BatchResults | None = None
    freshness: FreshnessBlock | None = None


def end_of_finish(frame: NodeFinish, result: NodeResult | None = None) -> NodeEnd:
    """From the event, with what only dbt's result object knows where that has come."""
    message, truncated = clean(frame.message, frame.truncated)
    return NodeEnd(
        dbt_status=frame.status,
        message=message,
        truncated=truncated,
        started_at=dbt_time(frame.started_at),
        finished_at=dbt_time(frame.finished_at),
        compile_s=seconds_of(frame.timing, "compile"),
        execute_s=seconds_of(frame.timing, "execute"),
        failures=frame.failures,
        adapter_response=frame.adapter_response,
        relation=frame.relation,
        freshness=freshness_block(result.freshness) if result else None,
    )


def end_of_result(result: NodeResult) -> NodeEnd:
    """Of a node that has a result and had no finish event."""
    message, truncated = clean(result.message, result.truncated)
    return NodeEnd(
        dbt_status=result.status,
        message=message,
        truncated=truncated,
        started_at=dbt_time(result.timing[0].started_at) if result.timing else None,
        finished_at=dbt_time(result.timing[-1].completed_at) if result.timing else None,
        compile_s=seconds_of(result.timing, "compile"),
        execute_s=seconds_of(result.timing, "execute"),
        failures=result.failures,
        adapter_response=result.adapter_response,
        batch_results=result.batch_results,
        freshness=freshness_block(result.freshness),
    )


def end_of_hook(frame: HookFinish, began: float | None) -> NodeEnd:
    """A hook's events carry no times of their own: those of the callbacks stand in."""
    message, truncated = clean(frame.message, False)
    return NodeEnd(
        dbt_status=frame.status,
        message=message,
        truncated=truncated,
        started_at=utc(began) if began is not None else None,
        finished_at=utc(frame.at) if began is not None else None,
        execute_s=frame.execution_s if began is not None else None,
    )


def utc(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)


def dbt_time(text: str | None) -> datetime | None:
    """dbt writes node times as naive ISO 8601 in UTC."""
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
        return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def seconds_of(timing: Iterable[Timing], name: str) -> float | None:
    """How long `compile` or `execute` took. Not dbt's execution_time: that is a float32."""
    for span in timing:
        if span.name == name:
            began, ended = dbt_time(span.started_at), dbt_time(span.completed_at)
            if began is not None and ended is not None:
                return max((ended - began).total_seconds(), 0.0)
    return None


def clean(text: str | None, truncated: bool = False) -> tuple[str | None, bool]:
    """Without terminal colours and outer empty lines, within MAX_TEXT_BYTES; empty is null."""
    if not text:
        return None, truncated
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    text, was_cut = cut(text.strip("\r\n"), MAX_TEXT_BYTES)
    return text or None, truncated or was_cut


def cut(text: str, limit: int) -> tuple[str, bool]:
    """The longest beginning of `text` with at most `limit` bytes of UTF-8."""
    if len(text) * 4 <= limit:
        return text, False
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return text, False
    return data[:limit].decode("utf-8", "ignore"), True


def amount(response: dict[str, Any], *keys: str) -> int | None:
    """The first key with a count. Adapters say -1 for "unknown", and protobuf made floats."""
    for key in keys:
        value = response.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value) and value >= 0:
            return int(value)
    return None


def word(response: dict[str, Any], *keys: str) -> str | None:
    """The first key with a non-empty text."""
    for key in keys:
        value = response.get(key)
        if isinstance(value, str) and value:
            return value
    return None


def error_block(error: NodeError | ErrorInfo | None, message: str | None) -> ErrorBlock | None:
    """What was raised, else what the message's first words say ("Database Error in model")."""
    if error is not None:
        text, truncated = clean(error.message, error.truncated)
        return ErrorBlock(
            class_=error.error_class,
            message=text or "",
            dbt_code=error.code,
            truncated=truncated,
        )
    if message is None:
        return None
    head = _ERROR_HEAD.match(message)
    return ErrorBlock(class_=head[1] if head else "Unknown", message=message)


def freshness_block(freshness: Freshness | None) -> FreshnessBlock | None:
    if freshness is None:
        return None
    return FreshnessBlock(
        max_loaded_at=dbt_time(freshness.max_loaded_at),
        snapshotted_at=dbt_time(freshness.snapshotted_at),
        age_s=freshness.age_s,
        warn_after_s=freshness.warn_after_s,
        error_after_s=freshness.error_after_s,
        filter=freshness.filter,
    )


def batch_status(frame: BatchFinish) -> NodeStatus:
    """LogBatchResult says `error` or `skipped`, and otherwise the adapter's word ("INSERT 3")."""
    return DBT_NODE_STATUS.get(frame.status, NodeStatus.SUCCESS)


def batch_results(batches: Iterable[BatchFinish]) -> BatchResults | None:
    """As dbt will return them; null when a batch did not say which window it had."""
    successful: list[list[str]] = []
    failed: list[list[str]] = []
    for batch in batches:
        if batch.event_time_start is None or batch.event_time_end is None:
            return None
        passed = batch_status(batch) is NodeStatus.SUCCESS
        (successful if passed else failed).append([batch.event_time_start, batch.event_time_end])
    if not successful and not failed:
        return None
    return BatchResults(successful=sorted(successful), failed=sorted(failed))


def node_block(node: PlannedNode) -> NodeBlock:
    return NodeBlock(
        unique_id=node.unique_id,
        resource_type=node.resource_type,
        name=node.name,
        package_name=node.package_name,
        version=node.version,
        materialized=node.materialized,
        path=node.path,
        fqn=node.fqn,
        tags=node.tags,
        group=node.group,
        access=node.access,
        owners=node.owners,
        meta=node.meta,
        checksum=node.checksum,
        matches=node.matches,
        upstream=node.upstream,
    )


def block_from_id(unique_id: str) -> NodeBlock:
    """What a unique_id alone tells: `model.shop.dim.v2`, `test.shop.not_null_x.1a2b3c4d5e`."""
    resource_type, _, rest = unique_id.partition(".")
    package_name, _, tail = rest.partition(".")
    parts = tail.split(".")
    version = None
    if resource_type == "model" and len(parts) > 1 and _VERSION.fullmatch(parts[-1]):
        version = parts.pop()[1:]
    elif resource_type == "test" and len(parts) > 1:
        parts.pop()  # the hash of a generic test's arguments
    elif resource_type in ("source", "unit_test"):
        parts = parts[-1:]  # before it: the source's, or the tested model's name
    return NodeBlock(
        unique_id=unique_id,
        resource_type=resource_type,
        name=".".join(parts) or unique_id,
        package_name=package_name or None,
        version=version,
        block_status="from_event",
    )
