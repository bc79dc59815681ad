"""Which dbt is here, before it is imported; which adapter, without asking dbt.

Importing dbt takes seconds and a 2.x engine cannot call back at all, so the installed
distributions are read first.
"""

from __future__ import annotations

import importlib
import os
import re
from importlib import metadata
from typing import Any, Dict, List, Optional, Tuple

SUPPORTED = "dbt Core 1.8 to 1.12 are supported"
NOT_ADAPTERS = frozenset(
    {
        "dbt-adapters",
        "dbt-autofix",
        "dbt-common",
        "dbt-core",
        "dbt-core-experimental-parser",
        "dbt-extractor",
        "dbt-metricflow",
        "dbt-protos",
        "dbt-semantic-interfaces",
        "dbt-sl-sdk",
        "dbt-tests-adapter",
    }
)


class Refusal(Exception):
    """This interpreter cannot run dbt for us. Becomes the `refused` frame."""

    def __init__(self, code: str, message: str, engine: Optional[str] = None) -> None:
        self.code, self.message, self.engine = code, message, engine
        super().__init__(message)


def installed_dbt() -> str:
    """The version of dbt-core, if we can run it. Raises Refusal."""
    core, fusion = _version("dbt-core"), _version("dbt")
    for name, version in (("dbt-core", core), ("dbt", fusion)):
        if version is not None and _release(version)[0] >= 2:
            raise Refusal(
                "dbt_2x",
                f"{name} {version} is installed; its runner cannot call back, so its runs "
                f"cannot be streamed. {SUPPORTED}",
                f"{name} {version}",
            )
    if core is None:
        raise Refusal("no_dbt", f"dbt-core is not installed for this interpreter. {SUPPORTED}")
    if _release(core) < (1, 8):
        raise Refusal(
            "dbt_too_old", f"dbt-core {core} is installed. {SUPPORTED}", f"dbt-core {core}"
        )
    return core


def adapter(args: List[str]) -> Tuple[Optional[str], Optional[str]]:
    """Type and version of the target's adapter, as far as plain YAML tells; else None."""
    try:
        kind = _target_type(args) or only_adapter()
    except Exception:  # any mistake in a project's YAML is dbt's to tell, in its own words
        kind = only_adapter()
    return kind, _version(f"dbt-{kind}") if kind else None


def _version(distribution: str) -> Optional[str]:
    try:
        # Broken metadata gives None (Python 3.8 to 3.11).
        found: Optional[str] = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    return found


def _release(version: str) -> Tuple[int, int]:
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(match.group(1)), int(match.group(2) or 0)) if match else (0, 0)


def only_adapter() -> Optional[str]:
    """The type of the one that is installed; None where there are several, or none."""
    names = set()
    for distribution in metadata.distributions():
        name = str(distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith("dbt-") and name not in NOT_ADAPTERS:
            names.add(name[len("dbt-") :])
    return names.pop() if len(names) == 1 else None


def _target_type(args: List[str]) -> Optional[str]:
    environ = os.environ
    profiles_dir = _option(args, "--profiles-dir") or environ.get("DBT_PROFILES_DIR")
    if not profiles_dir:
        here = os.path.exists("profiles.yml")
        profiles_dir = os.getcwd() if here else os.path.expanduser("~/.dbt")
    project_dir = _option(args, "--project-dir") or environ.get("DBT_PROJECT_DIR") or "."
    name = (
        _option(args, "--profile")
        or environ.get("DBT_PROFILE")
        or _yaml(os.path.join(project_dir, "dbt_project.yml")).get("profile")
    )
    profile = _yaml(os.path.join(profiles_dir, "profiles.yml"))[str(name)]
    target = (
        _option(args, "--target", "-t") or environ.get("DBT_TARGET") or profile.get("target")
    ) or "default"
    kind = profile["outputs"][target]["type"]
    return kind if isinstance(kind, str) and re.match(r"[\w-]+$", kind) else None


def _yaml(path: str) -> Dict[str, Any]:
    yaml = importlib.import_module("yaml")  # dbt's own dependency
    with open(path, encoding="utf-8") as file:
        content: Dict[str, Any] = yaml.safe_load(file) or {}
    return content


def _option(args: List[str], *names: str) -> Optional[str]:
    for position, word in enumerate(args):
        head, equals, value = word.partition("=")
        if head in names:
            if equals:
                return value
            if position + 1 < len(args):
                return args[position + 1]
    return None
