"""One OTLP/HTTP endpoint by the rules of the specification, and a server that answers as told."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from dbtstream.config import OtlpConfig
from dbtstream.otlp_encoding import Envelope
from dbtstream.publishers import otlp_http
from dbtstream.publishers.otlp_export import OtlpExport
from dbtstream.publishers.otlp_http import OtlpHttp, Outcome, Signal
from tests.otlp_sink import otlp_sink

LONG_S = 30.0


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Server:
    url: str
    answers: list[Answer]
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


@contextmanager
def answering(*answers: Answer) -> Iterator[Server]:
    """With these, one after the other; then with 200."""
    server = Server("", list(answers))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            server.paths.append(self.path)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            answer = server.answers.pop(0) if server.answers else Answer(200)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)
            server.asked.release()

        def log_message(self, *_: object) -> None:
            """Not on stderr."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    server.url = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def to(url: str, signal: Signal = "traces", timeout_s: float = LONG_S, **headers: str) -> OtlpHttp:
    return OtlpHttp(OtlpConfig(endpoint=url, timeout_s=timeout_s), signal, headers)


def test_what_is_sent() -> None:
    with answering() as server:
        assert to(server.url + "/base/", "logs", team="data").post(b"spans").ok

    assert server.paths == ["/base/v1/logs"]
    assert gzip.decompress(server.bodies[0]) == b"spans"
    (headers,) = server.headers
    assert headers["content-type"] == "application/x-protobuf"
    assert headers["content-encoding"] == "gzip"
    assert headers["team"] == "data"
    assert headers["user-agent"].startswith("dbtstream/")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_came_at_a_bad_moment_is_sent_again(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp_http, "FIRST_RETRY_S", 0.01)
    with answering(Answer(status), Answer(status)) as server:
        assert to(server.url).post(b"spans") == Outcome(True, 200)

    assert len(server.bodies) == 3
    assert len(set(server.bodies)) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 500, 501])
def test_any_other_refusal_is_final(status: int) -> None:
    with answering(Answer(status)) as server:
        outcome = to(server.url).post(b"spans")

    assert (outcome.ok, outcome.status, outcome.error_type) == (False, status, str(status))
    assert outcome.problem.startswith(f"HTTP {status}")
    assert len(server.bodies) == 1


def test_it_waits_as_long_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp_http, "FIRST_RETRY_S", 0.001)
    with answering(Answer(503, headers={"Retry-After": "1"})) as server:
        began = monotonic()
        assert to(server.url).post(b"spans").ok
        assert monotonic() - began >= 1.0


def test_it_does_not_wait_for_longer_than_its_time() -> None:
    with answering(Answer(503, headers={"Retry-After": "3600"})) as server:
        outcome = to(server.url).post(b"spans")

    assert (outcome.ok, outcome.status) == (False, 503)


def test_a_redirect_is_not_followed_and_the_log_will_say_so() -> None:
    with answering(Answer(302, headers={"Location": "/elsewhere"})) as server:
        outcome = to(server.url).post(b"spans")

    assert not outcome.ok
    assert "set `endpoint` to where it leads" in outcome.problem
    assert server.paths == ["/v1/traces"]


def test_a_partial_success_counts_what_is_rejected(caplog: pytest.LogCaptureFixture) -> None:
    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans = 2
    answer.partial_success.error_message = "too old"
    envelope = Envelope({}, scope="s", version="1", schema_url="")
    with answering(Answer(200, answer.SerializeToString())) as server:
        export = OtlpExport("traces", to(server.url), envelope, None)
        for _ in range(5):
            export.put(b"")
        assert export.finish(LONG_S) == 0

    flow = export.flow
    assert (flow.received, flow.sent, flow.failed, flow.dropped) == (5, 3, 2, 0)
    (record,) = caplog.records
    assert record.message == "the collector does not want some of the telemetry"
    assert (record.__dict__["count"], record.__dict__["problem"]) == (2, "too old")


def test_a_partial_success_of_log_records() -> None:
    answer = ExportLogsServiceResponse()
    answer.partial_success.rejected_log_records = 1
    with answering(Answer(200, answer.SerializeToString())) as server:
        assert to(server.url, "logs").post(b"records").rejected == 1


def test_a_page_of_a_proxy_is_an_answer_too() -> None:
    with answering(Answer(200, b"<html>welcome</html>")) as server:
        outcome = to(server.url).post(b"spans")

    assert (outcome.ok, outcome.rejected) == (True, 0)


def test_nobody_there() -> None:
    with answering() as gone:
        pass
    outcome = to(gone.url, timeout_s=0.2).post(b"spans")
    assert (outcome.ok, outcome.status, outcome.error_type) == (False, None, "ConnectionError")


def test_an_end_ends_the_wait_between_two_tries() -> None:
    with answering(Answer(503, headers={"Retry-After": "20"})) as server:
        http = to(server.url)
        outcomes: list[Outcome] = []
        posting = threading.Thread(target=lambda: outcomes.append(http.post(b"spans")))
        posting.start()
        assert server.asked.acquire(timeout=LONG_S)
        http.abandon()
        posting.join(10.0)

    assert not posting.is_alive()
    assert [outcome.status for outcome in outcomes] == [503]


class TestWhatTheConfigLeavesOpen:
    """Is OpenTelemetry's: https://opentelemetry.io/docs/specs/otel/protocol/exporter/."""

    def test_an_endpoint_for_all_signals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/")
        assert to("").url == "http://collector:4318/v1/traces"
        assert to("", "logs").url == "http://collector:4318/v1/logs"

    def test_an_endpoint_of_one_signal_is_taken_as_it_is(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://tempo/in")
        assert to("").url == "http://tempo/in"
        assert to("http://ours").url == "http://ours/v1/traces"

    def test_nothing_is_a_collector_beside_us(self) -> None:
        assert to("").url == "http://localhost:4318/v1/traces"

    def test_headers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20b,team=all")
        with answering() as server:
            assert to(server.url, team="data").post(b"spans").ok

        assert server.headers[0]["api-key"] == "a b"
        assert server.headers[0]["team"] == "data"

    def test_certificates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"):
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", f"/{name.lower()}.pem")
        session = to("https://collector")._session
        assert session.verify == "/certificate.pem"
        assert session.cert == ("/client_certificate.pem", "/client_key.pem")


def test_more_than_a_batch_goes_in_several_requests_and_soon() -> None:
    """A full batch does not wait for the end of the second."""
    envelope = Envelope({}, scope="s", version="1", schema_url="")
    with otlp_sink() as sink:
        export = OtlpExport("traces", to(sink.url), envelope, None)
        for _ in range(1100):
            export.put(b"")
        sink.wait(lambda s: len(s.spans) == 1100)
        assert export.finish(LONG_S) == 0

    assert len(sink.requests) >= 3
    assert (export.flow.sent, export.waiting, export.in_flight) == (1100, 0, 0)


def test_the_queue_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dbtstream.publishers.otlp_export.MAX_QUEUE_BYTES", 1000)
    monkeypatch.setattr("dbtstream.publishers.otlp_export.SCHEDULE_S", LONG_S)
    envelope = Envelope({}, scope="s", version="1", schema_url="")
    with answering() as server:
        export = OtlpExport("traces", to(server.url), envelope, None)
        for _ in range(10):
            export.put(b"\0" * 300)
        flow = export.flow
        assert (export.waiting, flow.received, flow.dropped) == (3, 10, 7)
        export.finish(LONG_S)
