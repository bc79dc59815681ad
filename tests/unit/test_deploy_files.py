"""Every file of deploy/ is held to something by a test: the list of which, kept complete."""

import subprocess
from pathlib import PurePosixPath

import pytest

from tests.deploy import DEPLOY, ROOT

HELD_BY: dict[str, tuple[str, ...]] = {
    "README.md": ("unit/test_deploy_readme.py",),
    "dbtstream.toml": ("unit/test_deploy_config.py",),
    "compose.yaml": ("unit/test_deploy_compose.py",),
    "tempo/tempo.yaml": ("unit/test_deploy_compose.py",),
    "docker/*": ("unit/test_deploy_docker.py", "acceptance/test_deploy_image.py"),
    "systemd/*": ("unit/test_deploy_systemd.py",),
    "kubernetes/*": ("unit/test_deploy_kubernetes.py",),
    "nats/private.conf": ("integration/test_deploy_nats.py",),
    "nats/single.conf": ("integration/test_nats_roles.py",),
    "nats/cluster.conf": ("integration/test_nats_roles.py",),
    "nats/roles.conf": ("integration/test_nats_roles.py",),
    "nats/make_keys.py": ("integration/test_nats_roles.py",),
    "examples/*": ("acceptance/test_example_subscribers.py",),
    "prometheus/**/*": ("acceptance/test_dashboards.py",),
    "grafana/**/*": ("acceptance/test_dashboards.py",),
    "otel-collector/*": ("unit/test_deploy_collector.py",),
    "datadog/**/*": ("unit/test_deploy_datadog.py",),
}
"""Patterns of files, and the tests that load them or compare them with the code."""


def committed() -> list[str]:
    """What is in the repository, or would be: not node_modules, not caches."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "deploy"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [line.removeprefix("deploy/") for line in done.stdout.splitlines()]


def matches(file: str, pattern: str) -> bool:
    """Path.match of Python 3.11 knows no `**`."""
    folder = pattern.rpartition("/")[0]
    if folder.endswith("/**"):
        return file.startswith(folder.removesuffix("**"))
    return PurePosixPath(file).match(pattern) and file.count("/") == pattern.count("/")


def test_a_file_that_no_test_claims_fails() -> None:
    files = committed()
    assert "README.md" in files
    unclaimed = [file for file in files if not any(matches(file, pattern) for pattern in HELD_BY)]
    assert unclaimed == []


@pytest.mark.parametrize("pattern", HELD_BY)
def test_the_claims_are_true(pattern: str) -> None:
    files = [file for file in committed() if matches(file, pattern)]
    assert files
    for test in HELD_BY[pattern]:
        text = (ROOT / "tests" / test).read_text(encoding="utf-8")
        # It at least names a folder or a file of them.
        assert any(part in text for file in files for part in PurePosixPath(file).parts)


@pytest.mark.parametrize("file", ["compose.yaml", "docker/Dockerfile", "tempo/tempo.yaml"])
def test_what_could_not_be_loaded_says_so_first(file: str) -> None:
    head = (DEPLOY / file).read_text(encoding="utf-8")[:1600]
    assert any(
        words in head
        for words in ("it has not been started", "No image was built", "No Tempo has loaded it")
    )
