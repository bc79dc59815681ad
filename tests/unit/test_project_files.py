"""What a parse of a project read, and whether all of it is still the same."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dbtstream.dbt_child import project_files
from dbtstream.dbt_child.project_files import RACY_NS, Places, difference, first_change, take

Change = Callable[[Path], object]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("models/a.sql", "models/deep/b.sql", "models/c.yml", "seeds/s.csv", "lib/m.sql"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "dbt_project.yml").write_text("name: shop")
    (tmp_path / "dbt_packages").mkdir()
    (tmp_path / "models" / "linked").symlink_to(tmp_path / "lib")
    return tmp_path


def places(project: Path) -> Places:
    return Places(
        files=[str(project / "dbt_project.yml"), str(project / "packages.yml")],
        folders=[str(project / "models"), str(project / "seeds"), str(project / "analyses")],
        listed=[str(project / "dbt_packages")],
    )


def same_stat(path: Path, text: str) -> None:
    """Another content of the same length, and all times that can be set put back."""
    was = path.stat()
    assert len(text) == was.st_size
    path.write_text(text)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def no_seeds(project: Path) -> None:
    (project / "seeds/s.csv").unlink()
    (project / "seeds").rmdir()


def analyses(project: Path) -> None:
    (project / "analyses").mkdir()
    (project / "analyses/q.sql").touch()


def relink(project: Path) -> None:
    (project / "models/linked").unlink()
    (project / "models/linked").symlink_to(project / "seeds")


def replace(project: Path) -> None:
    (project / "n").write_text("name: shop")
    (project / "n").replace(project / "dbt_project.yml")


def edit_unseen(project: Path) -> None:
    same_stat(project / "models/a.sql", "MODELS/a.sql")


CHANGES: dict[str, tuple[Change, str]] = {
    "content": (lambda p: (p / "models/a.sql").write_text("other"), "models/a.sql"),
    "content of the same size": (edit_unseen, "models/a.sql"),
    "new file": (lambda p: (p / "models/deep/new.sql").touch(), "models/deep/new.sql"),
    "deleted file": (lambda p: (p / "models/deep/b.sql").unlink(), "models/deep/b.sql"),
    "renamed folder": (lambda p: (p / "models/deep").rename(p / "models/x"), "models/deep/b.sql"),
    "deleted folder": (no_seeds, "seeds/s.csv"),
    "a folder that was not there": (analyses, "analyses/q.sql"),
    "a file that was not there": (lambda p: (p / "packages.yml").touch(), "packages.yml"),
    "behind a symbolic link": (lambda p: (p / "lib/m.sql").write_text("x"), "models/linked/m.sql"),
    "a link to elsewhere": (relink, "models/linked/m.sql"),
    "another file in its place": (replace, "dbt_project.yml"),
    "a new package": (lambda p: (p / "dbt_packages/utils").mkdir(), "dbt_packages/utils/"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_and_named(project: Path, name: str) -> None:
    change, path = CHANGES[name]
    known = take(places(project))
    assert first_change(known, places(project)) is None
    change(project)
    assert first_change(known, places(project)) == f"{project}/{path}"
    now = take(places(project))
    assert difference(known, now) == f"{project}/{path}"
    assert first_change(now, places(project)) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p / "target").mkdir(),
        lambda p: (p / "shop.duckdb").write_text("a database beside the project"),
        lambda p: (p / "models/__pycache__").mkdir(),
        lambda p: (p / "models/empty").mkdir(),
    ],
    ids=["target", "database", "bytecode", "empty-folder"],
)
def test_what_dbt_does_not_read_is_no_change(project: Path, change: Change) -> None:
    known = take(places(project))
    change(project)
    assert first_change(known, places(project)) is None


def test_a_file_that_had_just_changed_is_known_by_its_content(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two edits in one tick of a coarse clock have the same stat."""
    stats = dict(project_files._stats(places(project)))
    monkeypatch.setattr(project_files, "_stats", lambda _: dict(stats))
    known = take(places(project))
    (project / "models/a.sql").write_text("MODELS/a.sql")
    assert first_change(known, places(project)) == str(project / "models/a.sql")
    assert difference(known, take(places(project))) == str(project / "models/a.sql")


def test_a_file_that_rests_is_known_by_its_stat(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = take(places(project))
    assert all(content for stat, content in known.values() if stat is not None)
    later = time.time_ns() + 2 * RACY_NS
    monkeypatch.setattr("time.time_ns", lambda: later)
    assert first_change(known, places(project)) is None
    assert not any(content for _, content in known.values())
    monkeypatch.setattr(project_files, "_content", lambda path: pytest.fail(f"{path} is read"))
    assert first_change(known, places(project)) is None


def test_a_link_that_goes_round_ends(project: Path) -> None:
    (project / "models/deep/up").symlink_to(project / "models")
    known = take(places(project))
    assert first_change(known, places(project)) is None
    (project / "models/deep/b.sql").write_text("other")
    changed = first_change(known, places(project))
    assert changed is not None
    assert changed.endswith("deep/b.sql")


def test_a_link_to_nowhere_may_come_to_lead_somewhere(project: Path) -> None:
    (project / "models/late.sql").symlink_to(project / "late.sql")
    known = take(places(project))
    assert first_change(known, places(project)) is None
    (project / "late.sql").touch()
    assert first_change(known, places(project)) == str(project / "models/late.sql")


def test_a_folder_within_another_is_looked_at_once() -> None:
    folders = {"/p/models", "/p/models/docs", "/p/models_2", "/p/seeds"}
    assert list(project_files._outermost(folders)) == ["/p/models", "/p/models_2", "/p/seeds"]
