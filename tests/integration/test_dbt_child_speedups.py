"""What the child does faster than dbt gives the same, on real dbt; where it is not known to, dbt
stays as it is."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dbt.compilation import Linker

from dbtstream import frames
from dbtstream.dbt_child import speedups
from tests import dbt_projects as projects
from tests.dbt_projects import Starting as Start
from tests.warm_children import WarmChildren


@pytest.fixture
def start(tmp_path: Path, warm: WarmChildren | None) -> Iterator[Start]:
    with projects.children(tmp_path, warm) as begin:
        yield begin


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """dbt's own function, as it is before and after the test."""
    monkeypatch.setattr(Linker, "find_cycles", Linker.find_cycles)
    return Linker.find_cycles


def test_random_graphs_have_the_same_answer(unpatched: Any) -> None:
    """Edges from lower to higher numbers make no cycle; others, loops among them, many."""
    linkers = [random_linker(random.Random(seed)) for seed in range(400)]
    expected = [unpatched(linker) for linker in linkers]
    assert speedups.apply("1.11.16") == ["cycle_check"]
    assert Linker.find_cycles is not unpatched
    assert [linker.find_cycles() for linker in linkers] == expected
    assert 50 < expected.count(None) < 350


def random_linker(chance: random.Random) -> Any:
    linker: Any = Linker()
    nodes = [f"model.shop.m{number:02}" for number in range(chance.randint(0, 30))]
    for node in chance.sample(nodes, len(nodes)):
        linker.add_node(node)
    backwards = chance.random() < 0.5
    for _ in range(chance.randint(0, 3 * len(nodes))):
        one, other = chance.choice(nodes), chance.choice(nodes)
        if backwards or one < other:
            linker.dependency(one, other)
    return linker


def test_applied_twice_it_is_there_once(unpatched: Any) -> None:
    assert speedups.apply("1.11.16") == speedups.apply("1.11.16") == ["cycle_check"]
    once = Linker.find_cycles
    speedups.apply("1.11.16")
    assert Linker.find_cycles is once


@pytest.mark.parametrize("version", ["1.7.19", "1.13.0a1", "1.1.0", "2.0.1"])
def test_another_release_stays_as_it_is(unpatched: Any, version: str) -> None:
    assert speedups.apply(version) == []
    assert Linker.find_cycles is unpatched


def test_a_function_that_reads_otherwise_stays_as_it_is(
    unpatched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_cycles(self: Any) -> str | None:
        return "mine"

    monkeypatch.setattr(Linker, "find_cycles", find_cycles)
    assert speedups.apply("1.11.16") == []
    assert Linker.find_cycles is find_cycles


def test_a_dbt_without_such_a_function_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "dbt.compilation", None)
    assert speedups.apply("1.11.16") == []
    assert "stays as it is" in capsys.readouterr().err


def test_a_project_with_a_cycle_is_told_in_dbts_words_with_and_without(start: Start) -> None:
    files = {
        "models/one.sql": "select * from {{ ref('two') }}",
        "models/two.sql": "select * from {{ ref('three') }}",
        "models/three.sql": "select * from {{ ref('one') }}",
    }
    told = []
    for faster in (True, False):
        child = start(files, ["build"], speedups=faster)
        assert child.end() == 2
        hello = child.frames[0]
        assert isinstance(hello, frames.Hello)
        assert hello.speedups == (["cycle_check"] if faster else [])
        assert child.result.error is not None
        told.append(child.result.error)
    assert told[0] == told[1]
    assert "Found a cycle: model.shop." in told[0].message
