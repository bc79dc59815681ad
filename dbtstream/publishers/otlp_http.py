"""One OTLP/HTTP endpoint, by the rules of the OTLP specification. Blocking; for a thread.

Layer 2, used by `otlp_export`. A request that came at a bad moment (429, 502, 503, 504, no
connection) is sent again while there is time, as late as the server asks for; every other answer
that is no 2xx is final. What the config leaves open is taken from OTEL_EXPORTER_OTLP_*.

https://opentelemetry.io/docs/specs/otlp/#otlphttp
"""

import gzip
import os
import random
import threading
from collections.abc import Mapping
from time import monotonic
from typing import Literal, NamedTuple

import requests
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.util.re import parse_env_headers

import dbtstream
from dbtstream.config import OtlpConfig
from dbtstream.otel_sdk import signal_url

Signal = Literal["traces", "logs"]

DEFAULT_ENDPOINT = "http://localhost:4318"
AT_BAD_MOMENTS = frozenset({429, 502, 503, 504})
FIRST_RETRY_S = 1.0
LEVEL = 1
"""Of gzip: it leaves 6.5 % of spans of models, in 2 us each; the usual 9 leaves 5.9 %, in 7 us."""


class Outcome(NamedTuple):
    """Of one request. `error_type` is OpenTelemetry's: a status, or the name of an exception."""

    ok: bool
    status: int | None = None
    error_type: str | None = None
    problem: str = ""
    rejected: int = 0  # spans or records that the server did not want, of a request that went well


class OtlpHttp:
    def __init__(self, otlp: OtlpConfig, signal: Signal, headers: Mapping[str, str]) -> None:
        self._signal = signal
        self.url = signal_url(otlp.endpoint, signal) or _endpoint(signal)
        self._timeout_s = otlp.timeout_s
        self._is_closed = threading.Event()
        self._session = requests.Session()
        self._session.verify = otlp.tls_ca_file or _variable("CERTIFICATE", signal) or True
        certificate, key = (
            _variable("CLIENT_CERTIFICATE", signal),
            _variable("CLIENT_KEY", signal),
        )
        if certificate:
            self._session.cert = (certificate, key) if key else certificate
        self._session.headers.update(
            {
                "User-Agent": f"dbtstream/{dbtstream.__version__}",
                "Content-Type": "application/x-protobuf",
                "Content-Encoding": "gzip",
                **parse_env_headers(_variable("HEADERS", signal) or "", liberal=True),
                **headers,
            }
        )

    def post(self, request: bytes) -> Outcome:
        """Within the config's `timeout_s`, or little more. Never raises."""
        data = gzip.compress(request, LEVEL, mtime=0)
        give_up_at, wait_s = monotonic() + self._timeout_s, FIRST_RETRY_S
        while True:
            outcome, asked_s = self._try(data, max(give_up_at - monotonic(), 0.01))
            if outcome.ok or asked_s is None:
                return outcome
            wait_for_s = asked_s or wait_s * random.uniform(0.8, 1.2)  # noqa: S311 - spread, no secret
            if monotonic() + wait_for_s > give_up_at or self._is_closed.wait(wait_for_s):
                return outcome
            wait_s *= 2

    def abandon(self) -> None:
        """End the wait between two tries."""
        self._is_closed.set()
        self._session.close()

    def _try(self, data: bytes, timeout_s: float) -> tuple[Outcome, float | None]:
        """And how long to wait before the next: 0 if that is left to us, None if there is none."""
        try:
            answer = self._session.post(
                self.url, data=data, timeout=timeout_s, allow_redirects=False
            )
        except requests.exceptions.RequestException as error:
            name = type(error).__name__
            is_transient = isinstance(error, requests.ConnectionError | requests.Timeout)
            return Outcome(False, None, name, str(error)), 0.0 if is_transient else None
        status = answer.status_code
        if 200 <= status < 300:
            rejected, why = self._rejected(answer.content)
            return Outcome(True, status, None, why, rejected), None
        problem = f"HTTP {status} {answer.reason}".rstrip()
        if 300 <= status < 400:
            problem += " (redirects are not followed: set `endpoint` to where it leads)"
        again_s = _seconds(answer.headers.get("Retry-After")) if status in AT_BAD_MOMENTS else None
        return Outcome(False, status, str(status), problem), again_s

    def _rejected(self, answer: bytes) -> tuple[int, str]:
        """Of a partial success, how many are lost and why; they must not be sent again."""
        if not answer:
            return 0, ""
        try:
            if self._signal == "traces":
                of_spans = ExportTraceServiceResponse.FromString(answer).partial_success
                told = of_spans.rejected_spans, of_spans.error_message
            else:
                of_logs = ExportLogsServiceResponse.FromString(answer).partial_success
                told = of_logs.rejected_log_records, of_logs.error_message
        except DecodeError:
            return 0, ""  # JSON, or a proxy's page: it said 200
        return told


def _endpoint(signal: Signal) -> str:
    own = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    base = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or DEFAULT_ENDPOINT
    return own or f"{base.removesuffix('/')}/v1/{signal}"


def _variable(name: str, signal: Signal) -> str | None:
    """The signal's own goes before that of all signals."""
    own = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_{name}")
    return own or os.environ.get(f"OTEL_EXPORTER_OTLP_{name}") or None


def _seconds(retry_after: str | None) -> float:
    """A date is not understood, and then it is our own pace."""
    return float(retry_after) if retry_after and retry_after.strip().isdecimal() else 0.0
