"""The pure parts of the dbt child: scrubbing, the queue and its frames, choosing what to tell."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dbtstream.dbt_child import channel as channels
from dbtstream.dbt_child import control, engine, results, retry
from dbtstream.dbt_child.callback import EventCallback
from dbtstream.dbt_child.channel import Channel
from dbtstream.dbt_child.event_names import OUTPUT, QUIET, TOLD
from dbtstream.dbt_child.scrub import MASK, MAX_RAW_CHARS, MAX_TEXT_BYTES, Scrubber, secret_values
from dbtstream.frames import (
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    AnyFrame,
    Artifact,
    Dropped,
    Log,
    NodeFinish,
    Nodes,
    Result,
    clock_s,
    deadline_line,
    decode_frame,
    frame_length,
)

# Scrubbing.


def test_secrets_are_the_non_blank_values_of_secret_variables_longest_first() -> None:
    environ = {
        "DBT_ENV_SECRET_SHORT": "abc",
        "DBT_ENV_SECRET_LONG": "abcdef",
        "DBT_ENV_SECRET_BLANK": "  ",
        "PGPASSWORD": "hunter2",
        "HOME": "/home/ada",
    }
    assert secret_values(environ, ["PGPASSWORD"]) == ["hunter2", "abcdef", "abc"]


def test_a_secret_that_contains_another_leaves_no_rest() -> None:
    assert Scrubber(["abc", "abcdef"]).text("x abcdef y abc") == (f"x {MASK} y {MASK}", False)


@pytest.mark.parametrize(
    "shape",
    [
        lambda secret: secret,
        json.dumps,
        repr,
        lambda secret: "'" + secret.replace("'", "''") + "'",
        lambda secret: repr({"vars": json.dumps({"a": secret})}),
        lambda secret: json.dumps(repr(secret + "'\"")),
        lambda secret: "https://host/?token=p%40ss%22w%27%5Cd%C3%B6",
    ],
)
def test_a_secret_is_found_in_the_spellings_of_json_python_sql_and_urls(shape: Any) -> None:
    secret = "p@ss\"w'\\dö"
    text, _ = Scrubber([secret]).text(shape(secret))
    assert MASK in text
    assert "p@ss" not in text
    assert "%40ss" not in text


def test_every_string_of_a_frame_is_scrubbed_but_its_tag_and_field_names() -> None:
    frame = {
        "t": "node_finish",
        "at": 1.5,
        "message": "node_finish here",
        "adapter_response": {"node_finish": ["node_finish", {"deep": "node_finish"}]},
    }
    scrubber = Scrubber(["node_finish", "message"])
    assert scrubber.frame(frame) == {
        "t": "node_finish",
        "at": 1.5,
        "message": f"{MASK} here",
        "adapter_response": {MASK: [MASK, {"deep": MASK}]},
    }
    assert scrubber.scrubbed == 4


def test_a_long_text_keeps_its_beginning_and_says_that_it_was_cut() -> None:
    """The cut is in bytes and never inside a character."""
    frame = Scrubber().frame({"t": "log", "message": "é" * MAX_TEXT_BYTES, "name": "n"})
    assert frame["message"] == "é" * (MAX_TEXT_BYTES // 2)
    assert frame["truncated"] is True
    assert "truncated" not in Scrubber().frame({"t": "log", "message": "é" * 10})


def test_no_part_of_a_secret_survives_at_the_place_of_a_cut() -> None:
    secret = "s3cr3t-value"
    for start in range(MAX_TEXT_BYTES - len(secret), MAX_TEXT_BYTES):
        assert "s3cr" not in Scrubber([secret]).text("x" * start + secret + "y" * 99)[0]
    # Masks are shorter than the secrets: the first, coarse cut comes into sight again.
    secret = "s3cr3t-" + "v" * 993
    for start in range(0, 1000, 77):
        text = "x" * start + secret * (MAX_RAW_CHARS // 1000 + 2)
        assert "s3cr" not in Scrubber([secret]).text(text)[0]


def test_colours_are_taken_out_before_secrets_are_looked_for() -> None:
    assert Scrubber(["abcdef"]).text("\x1b[31mab\x1b[0mcdef\x1b[0m") == (MASK, False)


def test_what_json_cannot_carry_becomes_a_word() -> None:
    value = {
        "nan": float("nan"),
        "inf": float("-inf"),
        "day": date(2024, 1, 2),
        "object": SimpleNamespace(a=1),
        3: (1, {2}),
        "big": 10**30,
        "lone": "\udc80",
    }
    clean = Scrubber().frame({"t": "x", "meta": value})["meta"]
    assert json.loads(json.dumps(clean, allow_nan=False)) == {
        "nan": "nan",
        "inf": "-inf",
        "day": "2024-01-02",
        "object": "namespace(a=1)",
        "3": [1, [2]],
        "big": 10**30,
        "lone": "\udc80",
    }


def test_a_value_without_end_is_cut_off() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    json.dumps(Scrubber().frame({"t": "x", "meta": endless}))
    wide = {str(number): "x" * 100 for number in range(10_000)}
    assert Scrubber().frame({"t": "x", "meta": wide})["meta"] == {"truncated": True}


# The channel.


class Pipe:
    """A channel, and what its other end reads."""

    def __init__(self, **options: Any) -> None:
        self.read_fd, write_fd = os.pipe()
        self.write_fd = write_fd
        self.scrubber = Scrubber(options.pop("secrets", ()))
        self.channel = Channel(write_fd, self.scrubber, **options)

    def frames(self) -> list[AnyFrame]:
        """Everything up to the end, which must come."""
        received: list[bytes] = []
        reader = threading.Thread(target=self._read, args=(received,))
        reader.start()
        self.channel.start()
        assert self.channel.close(timeout_s=30)
        os.close(self.write_fd)
        reader.join()
        return list(parse(b"".join(received)))

    def _read(self, received: list[bytes]) -> None:
        with os.fdopen(self.read_fd, "rb") as file:
            received.append(file.read())


def parse(data: bytes) -> Iterator[AnyFrame]:
    while data:
        end = LENGTH_BYTES + frame_length(data[:LENGTH_BYTES])
        yield decode_frame(data[LENGTH_BYTES:end])
        data = data[end:]


def log(message: str = "m", **fields: Any) -> dict[str, Any]:
    return {
        "t": "log",
        "at": 1.0,
        "level": "warn",
        "code": "C",
        "name": "N",
        "message": message,
        **fields,
    }


def node(unique_id: str, **fields: Any) -> dict[str, Any]:
    return {"unique_id": unique_id, "resource_type": "model", "name": "n", **fields}


def result() -> dict[str, Any]:
    return {
        "t": "result",
        "at": 1.0,
        "success": True,
        "exit_code": 0,
        "result_count": 0,
        "stats": {"events": 3},
    }


def test_frames_of_many_threads_are_numbered_without_holes_in_the_order_of_the_queue() -> None:
    pipe = Pipe()

    def emit(name: str) -> None:
        for number in range(500):
            pipe.channel.emit(log(f"{name} {number}"))

    threads = [threading.Thread(target=emit, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    frames = pipe.frames()
    assert [frame.n for frame in frames] == list(range(1, 2001))
    for name in "abcd":
        mine = [frame.message for frame in frames if isinstance(frame, Log)]
        assert [m for m in mine if m[0] == name] == [f"{name} {n}" for n in range(500)]


def test_log_frames_that_find_no_room_are_counted_and_nodes_are_kept() -> None:
    """The count comes before the result, which stays last."""
    pipe = Pipe(limit=10)
    for number in range(25):
        pipe.channel.emit(log(str(number)))
    finish = {"t": "node_finish", "at": 1.0, "unique_id": "model.shop.a", "status": "success"}
    pipe.channel.emit(finish)
    pipe.channel.emit(result())

    frames = pipe.frames()
    kinds = [type(frame) for frame in frames]
    assert kinds == [Log] * 10 + [NodeFinish, Dropped, Result]
    dropped = frames[-2]
    assert isinstance(dropped, Dropped)
    assert (dropped.family, dropped.count) == ("log", 15)
    assert [frame.n for frame in frames] == list(range(1, 14))


def test_what_was_dropped_is_told_as_soon_as_there_is_room() -> None:
    pipe = Pipe(limit=10)
    for number in range(12):
        pipe.channel.emit(log(str(number)))
    assert [frame.t for frame in tags(pipe.frames())] == ["log"] * 10 + ["dropped"]


def tags(frames: list[AnyFrame]) -> list[Any]:
    return [SimpleNamespace(t=frame.__struct_config__.tag) for frame in frames]


def test_a_long_list_is_sent_in_chunks_by_count_and_by_size() -> None:
    pipe = Pipe()
    small = [node(f"model.shop.s{number}") for number in range(450)]
    tags = ["x" * 8000] * 40
    big = [node(f"model.shop.b{number}", tags=tags) for number in range(8)]
    pipe.channel.emit({"t": "nodes", "at": 1.0, "nodes": small})
    pipe.channel.emit({"t": "nodes", "at": 1.0, "nodes": big})

    chunks = [frame.nodes for frame in pipe.frames() if isinstance(frame, Nodes)]
    assert [len(chunk) for chunk in chunks] == [200, 200, 50, 3, 3, 2]
    assert [planned.unique_id for chunk in chunks for planned in chunk] == [
        item["unique_id"] for item in small + big
    ]


def test_a_frame_that_is_too_long_is_told_as_dropped_not_sent() -> None:
    pipe = Pipe()
    pipe.channel.emit({"t": "nodes", "at": 1.0, "nodes": [node("a", tags=["x" * 8000] * 600)]})
    (frame,) = pipe.frames()
    assert isinstance(frame, Dropped)
    assert (frame.family, frame.count) == ("nodes", 1)


def test_what_is_too_long_loses_what_is_heavy_and_arrives() -> None:
    """A finish its code, a node its columns: the plan and the run go on without."""
    pipe = Pipe()
    column = {"name": "c", "description": "\x01" * 5000}
    node = {"unique_id": "model.shop.a", "resource_type": "model", "name": "a"}
    pipe.channel.emit(
        {"t": "nodes", "at": 1.0, "nodes": [{**node, "columns": [column] * 500}, node]}
    )
    finish = {"t": "node_finish", "at": 1.0, "unique_id": "model.shop.a", "status": "success"}
    pipe.channel.emit({**finish, "compiled_code": "\x01" * 1_000_000})
    pipe.channel.emit({**finish, "compiled_code": "select 1"})
    first, second, third = pipe.frames()
    assert isinstance(first, Nodes)
    assert [each.columns for each in first.nodes] == [[], []]
    assert isinstance(second, NodeFinish)
    assert (second.compiled_code, second.compiled_code_truncated) == (None, True)
    assert isinstance(third, NodeFinish)
    assert (third.compiled_code, third.compiled_code_truncated) == ("select 1", False)


def test_a_description_is_cut_and_says_so_under_its_own_name() -> None:
    node = {
        "unique_id": "a",
        "description": "é" * MAX_TEXT_BYTES,
        "test_details": {"params": {1: 2}},
    }
    clean = Scrubber().value(node)
    assert clean["description"] == "é" * (MAX_TEXT_BYTES // 2)
    assert clean["description_truncated"] is True
    assert clean["test_details"] == {"params": {"1": 2}}


def test_a_frame_that_cannot_be_encoded_does_not_cost_the_others() -> None:
    class Awkward:
        def __str__(self) -> str:
            raise RuntimeError("no words")

    pipe = Pipe()
    pipe.channel.emit(log(level=Awkward()))
    pipe.channel.emit(log("after"))
    first, second = pipe.frames()
    assert isinstance(first, Dropped)
    assert first.family == "log"
    assert isinstance(second, Log)
    assert second.message == "after"


def test_the_result_counts_frames_and_scrubbed_strings() -> None:
    pipe = Pipe(secrets=["hunter2"])
    pipe.channel.emit(log("hunter2 and hunter2"))
    pipe.channel.emit(log("none"))
    pipe.channel.emit(result())
    last = pipe.frames()[-1]
    assert isinstance(last, Result)
    assert (last.stats.frames, last.stats.scrubbed, last.stats.events) == (3, 1, 3)


def test_a_parent_that_is_gone_is_noticed_once_and_nobody_blocks() -> None:
    pipe = Pipe()
    noticed: list[str] = []
    pipe.channel.on_broken = lambda: noticed.append("gone")
    os.close(pipe.read_fd)
    pipe.channel.start()
    for _ in range(100):
        pipe.channel.emit(log("x" * 8000))
    assert pipe.channel.close(timeout_s=30) is False
    assert noticed == ["gone"]
    os.close(pipe.write_fd)


def test_a_parent_that_does_not_read_cannot_hold_up_the_end() -> None:
    pipe = Pipe()
    for _ in range(100):
        pipe.channel.emit(log("x" * 8000))
    pipe.channel.start()
    assert pipe.channel.close(timeout_s=0.01) is False
    os.close(pipe.read_fd)  # lets the writer go
    pipe.channel._thread.join()
    os.close(pipe.write_fd)


def test_the_childs_frames_stay_below_the_parents_limit() -> None:
    assert channels.MAX_FRAME_BYTES + channels.CHUNK_BYTES < MAX_FRAME_BYTES


# The callback.


KINDS: dict[str, type] = {}


def event(name: str, level: str = "info", msg: str = "text", **data: Any) -> Any:
    """Looks like one of dbt's messages: the class name and the attributes are what counts."""
    info = SimpleNamespace(name=name, code="C1", level=level, msg=msg, invocation_id="i")
    kind = KINDS.setdefault(name, type(name + "Msg", (SimpleNamespace,), {}))
    return kind(info=info, data=SimpleNamespace(**data))


def told(*events: Any, **options: Any) -> list[dict[str, Any]]:
    frames: list[dict[str, Any]] = []
    callback = EventCallback(frames.append, **options)
    for one in events:
        callback(one)
    return frames


@pytest.mark.parametrize(
    ("threshold", "levels"),
    [
        ("debug", ["debug", "info", "warn", "error"]),
        ("info", ["info", "warn", "error"]),
        ("warn", ["warn", "error"]),
        ("error", ["error"]),
    ],
)
def test_an_unknown_event_is_a_log_line_from_the_wanted_level_on(
    threshold: str, levels: list[str]
) -> None:
    """Though its kind came first with a level below: dbt gives some events a level each time."""
    events = [event("Novel", level) for level in ("debug", "info", "warn", "error")]
    assert [frame["level"] for frame in told(*events, log_level=threshold)] == levels


def test_quiet_events_are_told_only_where_debug_lines_are_wanted() -> None:
    one = event("ConnectionUsed", "debug")
    assert told(one, log_level="info") == []
    assert [frame["name"] for frame in told(one, log_level="debug")] == ["ConnectionUsed"]


def test_what_another_frame_says_is_never_a_log_line() -> None:
    events = [event(name[: -len("Msg")], "error") for name in TOLD]
    assert told(*events, log_level="debug") == []


def test_output_of_a_command_is_told_whatever_the_log_level() -> None:
    events = [event(name[: -len("Msg")], "info") for name in OUTPUT]
    assert len(told(*events, log_level="error")) == len(OUTPUT)


def test_the_lists_of_event_names_do_not_overlap() -> None:
    named = set(EventCallback(lambda frame: None)._named)
    for one, other in ((QUIET, TOLD), (QUIET, OUTPUT), (TOLD, OUTPUT)):
        assert not one & other
    assert not named & (QUIET | TOLD | OUTPUT)


def test_a_callback_never_raises_and_remembers_the_first_error() -> None:
    """dbt can hang for ever on an exception in a callback (dbt-core#11612)."""
    callback = EventCallback(lambda frame: None)
    for _ in range(3):
        callback(event("LogStartBatch"))  # has none of the attributes
    callback(object())
    events, errors = callback.counts()
    assert (events, errors) == (4, 4)
    assert "AttributeError" in (callback.first_error or "")
    assert "_batch_start" in (callback.first_error or "")


def test_what_the_writer_cannot_read_of_an_event_is_counted_and_told_as_dropped() -> None:
    pipe = Pipe()
    callback = EventCallback(pipe.channel.emit)
    callback(event("NodeFinished"))  # has none of the attributes
    pipe.channel.emit({"t": "artifact", "at": 1.0, "kind": "manifest", "path": "x"})
    dropped, artifact = pipe.frames()
    assert isinstance(dropped, Dropped)
    assert (dropped.family, dropped.count) == ("node_finish", 1)
    assert isinstance(artifact, Artifact)
    assert callback.counts() == (1, 1)


def test_a_keyboard_interrupt_passes_for_it_is_what_cancels_dbt() -> None:
    def interrupted(_frame: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EventCallback(interrupted)(event("Novel", "error"))


def test_a_plan_without_a_task_says_why() -> None:
    line = event("ConcurrencyLine", num_threads=4, target_name="dev", node_count=7)
    (frame,) = told(line)
    assert (frame["t"], frame["node_count"], frame["threads"]) == ("plan", 7, 4)
    assert frame["status"].startswith("unavailable: ")


# The engine.


def dist(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("dists", "code", "name"),
    [
        ({}, "no_dbt", None),
        ({"dbt-core": "1.7.19"}, "dbt_too_old", "dbt-core 1.7.19"),
        ({"dbt-core": "2.0.1"}, "dbt_2x", "dbt-core 2.0.1"),
        ({"dbt": "2.0.0b2"}, "dbt_2x", "dbt 2.0.0b2"),
        ({"dbt-core": "1.11.0", "dbt": "2.0.0"}, "dbt_2x", "dbt 2.0.0"),
    ],
)
def test_a_dbt_that_cannot_be_streamed_is_refused_by_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dists: dict[str, str],
    code: str,
    name: str | None,
) -> None:
    for each, version in dists.items():
        dist(tmp_path, each, version)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(engine.Refusal) as refused:
        engine.installed_dbt()
    assert (refused.value.code, refused.value.engine) == (code, name)
    assert "1.8 to 1.12" in str(refused.value)


PROFILES = """
shop:
  target: "{{ env_var('T', 'dev') }}"
  outputs:
    dev: {type: duckdb}
    prod: {type: postgres}
    odd: {type: "{{ env_var('KIND') }}"}
"""


@pytest.mark.parametrize(
    ("target", "adapter"),
    [("dev", "duckdb"), ("prod", "postgres"), ("odd", None), ("absent", None), ("", None)],
)
def test_the_adapter_is_read_from_the_profile_or_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, adapter: str | None
) -> None:
    (tmp_path / "dbt_project.yml").write_text("name: shop\nprofile: shop\n")
    (tmp_path / "profiles.yml").write_text(PROFILES)
    dist(tmp_path, "dbt-duckdb", "1.9.9")
    dist(tmp_path, "dbt-postgres", "1.8.1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(engine, "only_adapter", lambda: None)
    for name in ("DBT_PROFILES_DIR", "DBT_PROJECT_DIR", "DBT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DBT_TARGET", target)
    versions = {"duckdb": "1.9.9", "postgres": "1.8.1", None: None}
    assert engine.adapter(["build"]) == (adapter, versions[adapter])
    assert engine.adapter(["build", "--target=prod"])[0] == "postgres"


def test_the_only_installed_adapter_is_a_good_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    dist(tmp_path, "dbt-core", "1.11.0")
    dist(tmp_path, "dbt-duckdb", "1.9.9")
    assert engine.adapter(["build"]) == ("duckdb", "1.9.9")
    dist(tmp_path, "dbt-postgres", "1.8.1")
    assert engine.adapter(["build"]) == (None, None)


# Starting.


def test_a_child_started_by_hand_says_how_it_is_started() -> None:
    child = Path(engine.__file__).parent
    ran = subprocess.run([sys.executable, str(child)], capture_output=True, text=True, check=False)
    assert ran.returncode == 70
    assert "usage: python dbt_child --fd N" in ran.stderr


def test_an_error_of_the_clean_up_after_an_interrupt_is_an_interrupted_run() -> None:
    try:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("already closed")
    except RuntimeError as error:
        outcome = SimpleNamespace(success=False, exception=error)
    assert results.result_frame(outcome, 0, {})["interrupted"] is True
    outcome = SimpleNamespace(success=False, exception=RuntimeError("of its own"))
    assert results.result_frame(outcome, 0, {})["interrupted"] is False


# Deadlines.


def test_a_deadline_is_two_finite_times() -> None:
    assert control.deadline("12.5 60") == (12.5, 60.0)
    assert control.deadline(deadline_line(1, 2.5).decode().split(" ", 1)[1]) == (1.0, 2.5)
    for argument in ("", "1", "1 2 3", "one two", "nan 2", "1 inf", "1 -inf"):
        with pytest.raises(ValueError):  # noqa: PT011 - its text is of no use to anybody
            control.deadline(argument)


def test_the_child_looks_at_the_same_clock_as_its_parent() -> None:
    before = clock_s()
    assert before <= control.clock_s() <= clock_s()


# dbt's retry.


def test_options_become_words_that_mean_the_same() -> None:
    options = {
        "target": "prod",
        "defer_state": "a b",
        "fail_fast": True,
        "partial_parse": False,
        "select": "not one of retry's",
        "vars": "{}",
    }
    known = frozenset({"target", "defer_state", "fail_fast", "partial_parse", "vars"})
    words = retry._words(options, known=known, without=frozenset({"vars"}))
    assert words == ["--target=prod", "--defer-state=a b", "--fail-fast", "--no-partial-parse"]


def test_what_a_file_says_of_its_run_is_made_safe_to_be_said_again() -> None:
    """Objects as JSON; target and profile only as they are given now, never as they were then."""
    args = {
        "which": "build",
        "vars": {"a": None},
        "sample": {"start": "2024-01-01T00:00:00+00:00"},
        "warn_error_options": {"error": [], "warn": [], "silence": []},
        "target": "prod",
        "profile": "other",
        "select": ["a", "b"],
    }
    retry._mend(args, {"target": "dev", "threads": "3", "state": "folder"})
    assert args == {
        "which": "build",
        "vars": '{"a": null}',
        "sample": '{"start": "2024-01-01T00:00:00+00:00"}',
        "warn_error_options": {"error": [], "warn": [], "silence": []},
        "target": "dev",
        "threads": "3",
        "select": ["a", "b"],
    }
    retry._mend(args, {"vars": "{b: 1}"})
    assert args["vars"] == "{b: 1}"
    assert "target" not in args
