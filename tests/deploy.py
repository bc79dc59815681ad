"""deploy/ as the tests read it: its YAML, its Dockerfile, its durations."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # dbt brings it

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # untyped, see above
    """Refuses a key that is there twice, of which YAML readers take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]  # without those that `<<` brings
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"{twice} twice, {node.start_mark}")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  # a SafeLoader


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """`("COPY", "--from=dbt /opt/dbt /opt/dbt")`, continued lines as one."""
    lines = dockerfile.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            yield instruction, " ".join(rest.split())


def seconds(duration: str) -> int:
    """Of `160s`; nothing else is used here."""
    found = re.fullmatch(r"(\d+)s", duration)
    assert found, duration
    return int(found[1])
