"""Children that replay invented frames of a run at a given rate, and cost next to nothing.

All frames are packed before the first of them is due. Then every 20 ms those that are due go
out in one write, after the time in them was set to now. Each node is three frames (start,
work, finish) and two events. With `lineage` the child also tells its manifest and each model's
compiled SQL, as dbt's does: ten columns, joined from two models before it, in a schema of the
target's, so that no two targets have the same SQL.
"""

import json
from pathlib import Path

import msgspec

from tests.scripted_child import scripted_child

EVENTS_PER_NODE = 2
REPORT = "replay.json"

BODY = """
TICK_S = 0.02
NODES, RATE, GO, LINEAGE = {nodes}, {rate}, {go}, {lineage}
UNSET = 1111111111.111111  # as wide as any time of this century
UNSET_TEXT = b"1111111111.111111"
THREAD = "Thread-1 (worker)"
WHEN = "2025-01-02T03:04:05.678901"

SCHEMA = os.environ["DBT_LOG_PATH"].split("/")[-3] if LINEAGE else "main"  # the target's name
COLUMNS = ["column_%d" % n for n in range(10)]

def name_of(i):
    return "model_%05d" % i

def upstream(i):
    return [name_of(n) for n in ((i - 1, i - 2) if LINEAGE else (i - 1,)) if n >= 0]

def relation(i):
    name = name_of(i)
    return {{"database": "shop", "schema": SCHEMA, "identifier": name,
        "relation_name": '"shop"."%s"."%s"' % (SCHEMA, name)}}

def node(i):
    fields = {{"path": name_of(i) + ".sql", "fqn": ["shop", name_of(i)], "tags": ["bench"],
        "checksum": "0" * 64, "relation": relation(i)}}
    if LINEAGE:
        fields.update(language="sql", columns=[
            {{"name": name, "description": "One of ten.", "data_type": None}} for name in COLUMNS])
    return model(name_of(i), *upstream(i), **fields)

def compiled(i):
    if i < 2:
        code = "select " + ", ".join("range as " + name for name in COLUMNS) + " from range(100)"
    else:
        a, b = (relation(n)["relation_name"] for n in (i - 1, i - 2))
        code = "with a as (select * from %s), b as (select * from %s)\\nselect %s\\n" % (a, b,
            ", ".join("a.%s + b.%s as %s" % (name, name, name) for name in COLUMNS))
        code += "from a join b using (column_0)"
    return {{"compiled_code": code, "compiled_code_hash": SCHEMA + "%062d" % i}}

def packed(i):
    unique_id = "model.shop." + name_of(i)
    common = {{"unique_id": unique_id, "at": UNSET}}
    step = {{"started_at": WHEN + "Z", "completed_at": WHEN + "Z"}}
    return b"".join((
        pack("node_start", thread=THREAD, started_at=WHEN, **common),
        pack("node_work", index=i + 1, total=NODES, **common),
        pack("node_finish", status="success", thread=THREAD, started_at=WHEN, finished_at=WHEN,
            timing=[{{"name": "compile", **step}}, {{"name": "execute", **step}}], message="OK",
            adapter_response={{"_message": "OK"}}, relation=relation(i),
            **(compiled(i) if LINEAGE and start["compiled_code"] else {{}}), **common),
    ))

def due(elapsed):
    return NODES if RATE is None else min(NODES, int(elapsed * RATE / 2) + 1)

start = start_line()
hello()
plan(*map(node, range(NODES)))
if LINEAGE and start["graph"]:
    graph(complete=start["known_manifest"] != "h")
waiting = [packed(i) for i in range(NODES)]
if GO:
    wait_for(GO)

cpu, began, sent, behind = time.process_time(), time.monotonic(), 0, 0.0
while sent < NODES:
    upto = min(due(time.monotonic() - began), sent + 500)
    if upto > sent:
        now = b"%.6f" % time.time()
        raw(b"".join(waiting[sent:upto]).replace(UNSET_TEXT, now))
        sent = upto
    if RATE is not None:
        left = sent * 2 / RATE - (time.monotonic() - began)
        behind = max(behind, -left)
        time.sleep(max(left, TICK_S) if left > 0 else 0)
report = {{"events": 2 * NODES, "elapsed_s": time.monotonic() - began, "behind_s": behind,
    "cpu_s": time.process_time() - cpu}}
with open(os.path.join(os.environ["DBT_LOG_PATH"], {report!r}), "w") as file:
    json.dump(report, file)
result(0, [(name_of(i), "success") for i in range(NODES)])
"""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What a child says of itself: of the time from its first node to its last."""

    events: int
    elapsed_s: float
    behind_s: float  # at worst, by the clock: the pipe was full
    cpu_s: float


def replaying_child(
    path: Path,
    *,
    nodes: int,
    rate: float | None = None,
    go: Path | None = None,
    lineage: bool = False,
) -> str:
    """An executable for a project's `python`. `rate` is in events per second, None is at once;
    with `go` it waits for that file between its plan and its first node."""
    waits_for = repr(str(go)) if go else None
    body = BODY.format(nodes=nodes, rate=rate, go=waits_for, lineage=lineage, report=REPORT)
    return scripted_child(path, body)


def replay_of(log_path: Path) -> Replay:
    return msgspec.convert(json.loads((log_path / REPORT).read_bytes()), Replay)
