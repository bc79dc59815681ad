"""Names on the wire: what must be unique is, what must be legal is."""

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from dbtstream.events import (
    Gap,
    LogLine,
    NodeBlock,
    NodeFinished,
    RunFinished,
    RunQueued,
)
from dbtstream.statuses import NodeStatus, RunStatus
from dbtstream.subjects import (
    event_headers,
    event_subject,
    is_run_id,
    kv_key,
    new_run_id,
    node_key,
    request_key,
    rfc3339,
    run_id_of_request,
    token,
)

AT = datetime(2025, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
TEXT = st.text(min_size=1, max_size=60)


def unescape(key: str) -> bytes:
    parts = key.split("=")
    return parts[0].encode() + b"".join(
        bytes([int(part[:2], 16)]) + part[2:].encode() for part in parts[1:]
    )


@given(TEXT)
def test_a_kv_key_gives_its_text_back(text: str) -> None:
    assert unescape(kv_key(text)) == text.encode()


@given(TEXT, TEXT)
def test_different_texts_have_different_kv_keys(a: str, b: str) -> None:
    assert (kv_key(a) == kv_key(b)) == (a == b)


@given(TEXT)
def test_a_kv_key_is_legal_for_nats(text: str) -> None:
    key = kv_key(text)
    assert set(key) <= set("-/_=.ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
    assert not key.startswith(".")
    assert not key.endswith(".")
    assert ".." not in key


def test_an_ordinary_unique_id_stays_readable_in_its_key() -> None:
    assert node_key("shop", "prod", "model.shop.orders") == "node.shop.prod.model.shop.orders"


@given(TEXT)
def test_a_token_is_one_legal_part_of_a_subject(text: str) -> None:
    made = token(text)
    assert 0 < len(made) <= 100
    assert not set(made) & set(" .*>\t\r\n\x00")


@given(TEXT, TEXT)
def test_request_keys_differ_by_request_and_have_no_odd_characters(a: str, b: str) -> None:
    one, other = request_key("shop", "prod", a), request_key("shop", "prod", b)
    assert (one == other) == (a == b)
    assert one.removeprefix("request.shop.prod.").isalnum()


@given(st.datetimes(datetime(2020, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001  # hypothesis wants naive bounds
def test_a_run_id_is_a_uuid7_of_its_time(at: datetime) -> None:
    run_id = new_run_id(at)
    assert is_run_id(run_id)
    assert int(run_id.replace("-", "")[:12], 16) == int(at.timestamp() * 1000)


def test_run_ids_are_unique_and_sort_by_time() -> None:
    ids = [new_run_id(datetime.fromtimestamp(1_700_000_000 + n, UTC)) for n in range(100)]
    assert ids == sorted(set(ids))


def test_a_plain_request_has_the_same_run_id_at_every_redelivery_and_others_another() -> None:
    assert run_id_of_request(7, AT) == run_id_of_request(7, AT)
    assert run_id_of_request(7, AT) != run_id_of_request(8, AT)
    assert is_run_id(run_id_of_request(7, AT))


def test_only_our_form_is_a_run_id() -> None:
    run_id = new_run_id(AT)
    for other in ("", "x", run_id.upper(), run_id.replace("-", ""), "9" * 36):
        assert not is_run_id(other)


ENVELOPE = {
    "event_id": "r.1.5",
    "time": AT,
    "seq": 5,
    "project": "shop",
    "target": "prod",
    "run_id": "r",
    "attempt": 1,
    "fence": 42,
    "worker": "w1",
}


def finished_node(name: str) -> NodeFinished:
    return NodeFinished(
        **ENVELOPE,  # type: ignore[arg-type]  # a dict of the envelope's fields
        node=NodeBlock(unique_id=f"model.shop.{name}", resource_type="model", name=name),
        status=NodeStatus.ERROR,
    )


def test_each_family_of_events_has_its_subject() -> None:
    event = {"event": ENVELOPE}["event"]
    subjects = [
        event_subject(finished_node("or ders.v2")),
        event_subject(
            RunFinished(**event, status=RunStatus.SUCCESS, exit_code=0, elapsed_s=1.0),  # type: ignore[arg-type]  # as above
            command="build",
        ),
        event_subject(RunQueued(**event, args=["run"])),  # type: ignore[arg-type]  # as above
        event_subject(LogLine(**event, level="warn", code="A1", name="X", message="m")),  # type: ignore[arg-type]  # as above
        event_subject(Gap(**event, dropped_family="log", count=1, why="w")),  # type: ignore[arg-type]  # as above
    ]
    assert subjects == [
        "dbt.events.shop.prod.node.model.or_ders_v2.error",
        "dbt.events.shop.prod.run.build._.success",
        "dbt.events.shop.prod.run._._.queued",
        "dbt.events.shop.prod.log.warn.X._",
        "dbt.events.shop.prod.gap.log._._",
    ]


def test_every_event_has_the_headers_of_the_contract() -> None:
    assert event_headers(finished_node("orders")) == {
        "Nats-Msg-Id": "r.1.5",
        "Content-Type": "application/json",
        "ce-specversion": "1.0",
        "ce-id": "r.1.5",
        "ce-source": "/dbtstream/w1",
        "ce-type": "dev.dbtstream.node.finished.v1",
        "ce-time": "2025-03-01T12:30:15.123456Z",
        "ce-subject": "model.shop.orders",
        "ce-datacontenttype": "application/json",
        "dbtstream-run-id": "r",
        "dbtstream-attempt": "1",
        "dbtstream-seq": "5",
        "dbtstream-fence": "42",
    }


@given(TEXT)
def test_header_values_are_ascii_whatever_a_node_is_called(name: str) -> None:
    assert event_headers(finished_node(name))["ce-subject"].isascii()


def test_times_are_utc_with_microseconds() -> None:
    assert rfc3339(AT) == "2025-03-01T12:30:15.123456Z"
