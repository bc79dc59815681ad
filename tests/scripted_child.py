"""Children that speak the frame protocol from a script: real processes, invented frames.

`DbtProcess` starts `<python> <dbt_child> --fd N`; a scripted child is an executable that takes
the place of `<python>` and does what its body says. Bodies use the functions of PRELUDE.
"""

import sys
import textwrap
from pathlib import Path

PRELUDE = '''
import faulthandler, json, os, signal, struct, sys, threading, time

fd = int(sys.argv[sys.argv.index("--fd") + 1])
os.set_inheritable(fd, False)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until start_line knows where stacks go
counter = 0
parent = os.getppid()

def raw(data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]

def pack(t, **fields):
    global counter
    counter += 1
    body = json.dumps({"t": t, "n": counter, "at": time.time(), **fields}).encode()
    return struct.pack(">I", len(body)) + body

def send(t, **fields):
    raw(pack(t, **fields))

def hello(**fields):
    send("hello", **{"protocol": 1, "pid": os.getpid(), "python_version": "3.11.7",
        "dbt_version": "1.11.16", "adapter_type": "duckdb", "adapter_version": "1.11.1", **fields})

def model(name, *upstream, **fields):
    return {"unique_id": f"model.shop.{name}", "resource_type": "model", "name": name,
        "package_name": "shop", "materialized": "table",
        "upstream": [f"model.shop.{u}" for u in upstream], **fields}

def plan(*nodes):
    for i in range(0, len(nodes), 200):
        send("nodes", nodes=list(nodes[i:i + 200]))
    send("plan", node_count=len(nodes), status="complete", manifest_hash="h", threads=4)

def table(name):
    return {"database": "shop", "schema": "main", "identifier": name,
        "relation_name": f'"shop"."main"."{name}"'}

def graph(*others, manifest_hash="h", complete=True, **fields):
    send("graph_nodes", nodes=list(others))
    send("graph", **{"manifest_hash": manifest_hash, "complete": complete, "adapter_type": "duckdb",
        "connection": {"type": "duckdb", "path": "/data/shop.duckdb"}, **fields})

def started(name):
    send("node_start", unique_id=f"model.shop.{name}")
    send("node_work", unique_id=f"model.shop.{name}", index=1, total=1)

def finished(name, status="success", **fields):
    send("node_finish", unique_id=f"model.shop.{name}", status=status, **fields)

def result(code=0, results=(), **fields):
    results = [{"unique_id": f"model.shop.{n}", "status": s} for n, s in results]
    for i in range(0, len(results), 200):
        send("results", results=results[i:i + 200])
    send("result", success=code == 0, exit_code=code, result_count=len(results), **fields)

def wait_for(path):
    """Until the test has made the file; a child whose parent died leaves."""
    while not os.path.exists(path):
        if os.getppid() != parent:
            sys.exit(1)
        time.sleep(0.005)

def start_line():
    """The parent's first line: what to run. From now on SIGUSR1 tells stacks, where asked."""
    start = json.loads(sys.stdin.buffer.readline())
    if start.get("stack_file"):
        stacks = os.open(start["stack_file"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    return start

def control_line():
    """The next line of control but deadlines, b"" when the parent is gone."""
    while (line := sys.stdin.buffer.readline()).startswith(b"deadline"):
        pass
    return line
'''


def scripted_child(path: Path, body: str) -> str:
    """Write the executable; its path is what a project's `python` is set to."""
    path.write_text(f"#!{sys.executable} -S\n{PRELUDE}\n{textwrap.dedent(body)}", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


GOOD_RUN = """
    start_line()
    hello()
    plan(model("orders"), model("customers", "orders"))
    for name in ("orders", "customers"):
        started(name)
        finished(name)
    result(0, [("orders", "success"), ("customers", "success")])
"""
