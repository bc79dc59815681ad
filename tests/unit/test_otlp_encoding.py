"""Our bytes say to protobuf what the bytes of OpenTelemetry's SDK say."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from dbtstream.config import TelemetryConfig
from dbtstream.log_records import log_record_of
from dbtstream.otlp_encoding import Envelope, encoded_log_record, encoded_span
from dbtstream.span_mapping import RunSpans
from dbtstream.spans import LogRecord, Span, SpanLink
from tests.sdk_spans import sdk_logs, sdk_traces
from tests.stories import Story, context, node

OF_RESOURCE: dict[str, str | bool | int | float] = {
    "service.name": "größe",
    "count": 3,
    "ratio": 0.5,
    "on": True,
}
RESOURCE = Resource(OF_RESOURCE)
SCOPE = InstrumentationScope("dbtstream", "1.2.3", "https://opentelemetry.io/schemas/1.44.0")
ENVELOPE = Envelope(
    {**OF_RESOURCE},
    scope=SCOPE.name,
    version=SCOPE.version or "",
    schema_url=SCOPE.schema_url or "",
)

# The SDK refuses an empty key, and a number beyond 64 bits; see the tests of the latter below.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
values = (
    texts
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.lists(texts, min_size=1, max_size=4)
)
attributes = st.dictionaries(texts.filter(bool), values, max_size=8)
times = st.integers(0, (1 << 63) - 1)


def ids(digits: int) -> st.SearchStrategy[str]:
    return st.text("0123456789abcdef", min_size=digits, max_size=digits).filter(
        lambda text: text.strip("0") != ""
    )


links = st.builds(SpanLink, trace_id=ids(32), span_id=ids(16), attributes=attributes)
spans = st.builds(
    Span,
    trace_id=ids(32),
    span_id=ids(16),
    name=texts,
    kind=st.sampled_from(["internal", "client", "consumer"]),
    start_ns=times,
    end_ns=times,
    parent_span_id=st.none() | ids(16),
    parent_is_remote=st.booleans(),
    tracestate=st.sampled_from(["", "rojo=1", "rojo=1,congo=t61rcWkgMzE", "no state, at all"]),
    attributes=attributes,
    links=st.lists(links, max_size=3),
    error=st.none() | texts,
)
records = st.builds(
    LogRecord,
    time_ns=times,
    severity=st.sampled_from(["debug", "info", "warn", "error"]),
    event_name=texts,
    body=texts,
    trace_id=ids(32),
    span_id=ids(16),
    attributes=attributes,
)


def traces(*told: Span) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    request.ParseFromString(ENVELOPE.request(encoded_span(span) for span in told))
    return request


@given(st.lists(spans, max_size=4))
def test_spans(told: list[Span]) -> None:
    if told:
        assert traces(*told) == sdk_traces(told, RESOURCE, SCOPE)


@given(st.lists(records, min_size=1, max_size=4))
def test_log_records(told: list[LogRecord]) -> None:
    ours = ENVELOPE.request(encoded_log_record(record) for record in told)
    assert ExportLogsServiceRequest.FromString(ours) == sdk_logs(told, RESOURCE, SCOPE)


def test_all_that_a_run_tells() -> None:
    told = Story()
    told.events += told.normalizer.queued(told.now)
    told.plan(node("model.shop.a", tags=["größe"]), node("model.shop.b", "model.shop.a"))
    told.run("model.shop.a")
    told.run("model.shop.b", "error", message="Database Error")
    told.result(1)
    told.end(exit_code=1, pid=4711, exited_at=told.now)
    run = RunSpans(context(), settings=TelemetryConfig(datadog=True))
    of_run = [span for event in told.events for span in run.take(event)]
    assert len(of_run) == 9

    assert traces(*of_run) == sdk_traces(of_run, RESOURCE, SCOPE)
    of_log = [record for event in told.events if (record := log_record_of(event)) is not None]
    ours = ENVELOPE.request(encoded_log_record(record) for record in of_log)
    assert of_log
    assert ExportLogsServiceRequest.FromString(ours) == sdk_logs(of_log, RESOURCE, SCOPE)


PLAIN = Span(trace_id="0a" * 16, span_id="0b" * 8, name="x", start_ns=1, end_ns=2)


def span_of(request: ExportTraceServiceRequest) -> object:
    ((of_resource,),) = (request.resource_spans,)
    ((of_scope,),) = (of_resource.scope_spans,)
    ((span,),) = (of_scope.spans,)
    return span


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 10**30])
def test_a_number_beyond_64_bits_is_about_that(number: int) -> None:
    """The SDK would lose the batch that it is in."""
    (pair,) = span_of(traces(msgspec.structs.replace(PLAIN, attributes={"n": number}))).attributes  # type: ignore[attr-defined]
    assert pair.value.double_value == float(number)


def test_a_lone_surrogate_costs_one_character_and_not_the_batch() -> None:
    bad = msgspec.structs.replace(PLAIN, name="ord\udc80ers", attributes={"k\udc80": "v\udc80"})
    span = span_of(traces(bad))
    assert span.name == "ord?ers"  # type: ignore[attr-defined]
    assert [(a.key, a.value.string_value) for a in span.attributes] == [("k?", "v?")]  # type: ignore[attr-defined]


def test_the_state_of_a_linked_trace_is_told() -> None:
    """Which the SDK (1.45) forgets."""
    link = SpanLink(trace_id="0c" * 16, span_id="0d" * 8, tracestate="rojo=1")
    span = span_of(traces(msgspec.structs.replace(PLAIN, links=[link])))
    assert [link.trace_state for link in span.links] == ["rojo=1"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 2047, 2048, 16383, 16384, 70_000, 3_000_000])
def test_texts_of_every_length(size: int) -> None:
    """Lengths are numbers of one byte, of two, of three."""
    told = msgspec.structs.replace(
        PLAIN, name="n" * size, attributes={"k" * (size or 1): "é" * size}
    )
    assert traces(told, PLAIN) == sdk_traces([told, PLAIN], RESOURCE, SCOPE)


def test_values_that_are_equal_to_python_are_not_the_same_attribute() -> None:
    told = [
        msgspec.structs.replace(PLAIN, attributes={"k": value}) for value in (1, True, 1.0, "1")
    ]
    assert traces(*told) == sdk_traces(told, RESOURCE, SCOPE)
