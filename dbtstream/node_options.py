"""`meta.dbtstream` of a node: what its owner wants told of it, and under which key.

Layer 1, pure. `asset_events` reads each node's options once, when the graph comes, and says what
is wrong with them in one `log` event. A wrong key costs that key, never the node.
"""

import re
import string
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from dbtstream.config import ASSET_KEY_FIELDS, template_problem
from dbtstream.frames import PlannedNode
from dbtstream.lineage_events import Identity
from dbtstream.messages import MAX_LABEL_BYTES, MAX_LABELS

NAME = "dbtstream"
MAX_SHOWN_CHARS = 60
SEPARATORS = "./:-_|"

_UNIQUE_ID = re.compile(r"[a-z_]+\.[^.\s]+\.\S+")


class UpstreamDataset(msgspec.Struct, frozen=True, kw_only=True):
    """An upstream outside the project, by OpenLineage's name for it."""

    namespace: str
    name: str


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The switches turn off events about the node; `upstream` adds to what dbt knows it reads."""

    emit: bool = True  # any lineage and asset event
    asset: bool = True
    lineage: bool = True
    key: str | None = None  # a template like the project's assets.key
    labels: dict[str, str] = {}
    upstream: tuple[str | UpstreamDataset, ...] = ()


DEFAULTS = NodeOptions()


def read_options(meta: Mapping[str, Any], unique_id: str) -> tuple[NodeOptions, list[str]]:
    """Of a node's whole `meta`: the options, and a sentence about each thing that is wrong."""
    given = meta.get(NAME)
    if given is None:
        return DEFAULTS, []
    problems: list[str] = []

    def complain(key: str, below: str, value: object, accepted: str) -> None:
        where = f"meta.{NAME}{key}{_cut(below)}"
        problems.append(f"{where} of {unique_id} is {_shown(value)}; {accepted}")

    if not isinstance(given, Mapping):
        complain("", "", given, _KEYS)
        return DEFAULTS, problems
    options: dict[str, Any] = {}
    for key, value in given.items():
        if (read := _READERS.get(key)) is None:
            problems.append(f"meta.{NAME}.{_cut(str(key))} of {unique_id} is not known; {_KEYS}")
        elif (found := read(value, partial(complain, f".{key}"))) is not None:
            options[key] = found
    return NodeOptions(**options), problems


def asset_key(
    template: str,
    prefix: str,
    *,
    project: str,
    target: str,
    identity: Identity,
    node: PlannedNode,
) -> str:
    """The asset's key, of a template without a `config.template_problem`.

    An empty field (of a database without schemas) takes a separator beside it along, so that no
    key begins or ends with a lone dot. Of nothing but empty fields, it is the dataset's name.
    """
    values = {
        "project": project,
        "target": target,
        "namespace": identity.namespace,
        "database": identity.database,
        "schema": identity.schema,
        "identifier": identity.identifier,
        "name": node.name,
        "package_name": node.package_name,
        "resource_type": node.resource_type,
    }
    key, after_empty = "", False
    for literal, field, _, _ in string.Formatter().parse(template):
        key += literal.lstrip(SEPARATORS) if after_empty else literal
        if field is not None:
            after_empty = not values[field]
            key += values[field] or ""
    if after_empty:
        key = key.rstrip(SEPARATORS)
    return prefix + (key or identity.name)


# -- reading ---------------------------------------------------------------------------------

_Complain = Callable[[str, object, str], None]
"""Of what below the key (`.team`, `[2]`, or nothing), what is there, what is accepted."""


def _switch(value: object, complain: _Complain) -> bool | None:
    if isinstance(value, bool):
        return value
    complain("", value, "true and false are accepted")
    return None


def _key(value: object, complain: _Complain) -> str | None:
    """Unlike the project's template, one of a single node needs no field."""
    if not isinstance(value, str) or not value.strip():
        complain("", value, "a text is accepted, such as marts.orders or {schema}/{identifier}")
        return None
    if template_problem(value + "{name}") is None:
        return value
    complain("", value, f"in braces may be: {', '.join(ASSET_KEY_FIELDS)}")
    return None


def _labels(value: object, complain: _Complain) -> dict[str, str] | None:
    if not isinstance(value, Mapping):
        complain("", value, "names with texts are accepted, such as {team: finance}")
        return None
    labels: dict[str, str] = {}
    for name, label in value.items():
        if not isinstance(name, str):
            complain("", name, "the names of labels must be texts")
        elif not isinstance(label, str):
            complain(f".{name}", label, "a label must be a text (in YAML, in quotes)")
        elif len(labels) >= MAX_LABELS:
            complain(f".{name}", label, f"it is one too many: {MAX_LABELS} labels are accepted")
        elif max(len(name.encode()), len(label.encode())) > MAX_LABEL_BYTES:
            complain(f".{name}", label, f"name and text may have {MAX_LABEL_BYTES} bytes")
        else:
            labels[name] = label
    return labels


def _upstream(value: object, complain: _Complain) -> tuple[str | UpstreamDataset, ...] | None:
    accepted = "unique_ids (source.shop.raw.orders) and {namespace: …, name: …} are accepted"
    if not isinstance(value, list | tuple):
        complain("", value, f"a list is accepted; in it, {accepted}")
        return None
    found: list[str | UpstreamDataset] = []
    for place, item in enumerate(value):
        if isinstance(item, str) and _UNIQUE_ID.fullmatch(item):
            found.append(item)
        elif isinstance(item, Mapping) and (dataset := _dataset(item)):
            found.append(dataset)
        else:
            complain(f"[{place}]", item, accepted)
    return tuple(dict.fromkeys(found))


def _dataset(item: Mapping[Any, Any]) -> UpstreamDataset | None:
    namespace, name = item.get("namespace"), item.get("name")
    if not isinstance(namespace, str) or not isinstance(name, str) or len(item) != 2:
        return None
    if not namespace.strip() or not name.strip():
        return None
    return UpstreamDataset(namespace=namespace, name=name)


_READERS: dict[str, Callable[[object, _Complain], Any]] = {
    "emit": _switch,
    "asset": _switch,
    "lineage": _switch,
    "key": _key,
    "labels": _labels,
    "upstream": _upstream,
}

_KEYS = f"accepted keys: {', '.join(_READERS)}"


def _shown(value: object) -> str:
    """`a list`, or what a YAML scalar is: `1, a number`."""
    match value:
        case None:
            return "empty"
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
    kind = "true or false" if isinstance(value, bool) else "a text"
    if isinstance(value, int | float) and not isinstance(value, bool):
        kind = "a number"
    return f"{_cut(str(value).lower() if isinstance(value, bool) else repr(value))}, {kind}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"
