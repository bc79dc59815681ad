"""dbt forked from a process that has it imported, and nothing else: what a warm start can be.

    python bare_fork.py DBT_CHILD imports|manifest      (in dbt's interpreter, by `ways.bare`)

It prepares as a template of ours does, then reads a run a line from stdin: {"folder": …,
"environment": …, "args": …}. Each is a fork that invokes dbt with these arguments and prints what
dbt prints; with `manifest`, the first line is a `parse` that is done here, and later runs get the
manifest that came of it. At the end of each a line tells the exit code. No pipe of frames, no
callback, no daemon: what ours takes longer than this is ours.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import multiprocessing.util
import os
import sys
import time
import traceback
from typing import Any, NoReturn

ENDED = "bare fork ended: "


def main() -> None:
    folder, kind = sys.argv[1:]
    load_child_package(folder)
    imports = importlib.import_module("dbtstream_child.imports")
    speedups = importlib.import_module("dbtstream_child.speedups")
    engine = importlib.import_module("dbtstream_child.engine")
    resource_tracker = importlib.import_module("multiprocessing.resource_tracker")
    imports.import_all()
    speedups.apply(engine.installed_dbt())
    resource_tracker.ensure_running()
    manifest = None
    if kind == "manifest":
        manifest = parsed(json.loads(sys.stdin.readline()))
        tell(0)
    gc.collect()
    gc.freeze()
    gc.disable()
    for line in sys.stdin:
        run = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become_run(run, manifest)
        _, status = os.waitpid(pid, 0)
        tell(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status))


def tell(code: int) -> None:
    print(ENDED + json.dumps({"code": code}), flush=True)


def load_child_package(folder: str) -> None:
    """dbt's side of dbtstream, as its own __main__ loads it."""
    init = os.path.join(folder, "__init__.py")
    spec = importlib.util.spec_from_file_location(
        "dbtstream_child", init, submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dbtstream_child"] = module
    spec.loader.exec_module(module)


def parsed(run: dict[str, Any]) -> Any:
    """The manifest, from the parse cache that there is; and all macros compiled, as dbt would
    keep them once it has used them."""
    from dbt.cli.main import dbtRunner
    from dbt_common.clients.jinja import template_cache

    take_place(run)
    outcome = dbtRunner().invoke(run["args"])
    if not outcome.success:
        raise SystemExit(f"the parse failed: {outcome.exception}")
    manifest: Any = outcome.result
    for macro in manifest.macros.values():
        template_cache.get_node_template(macro)
    return manifest


def take_place(run: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(run["environment"])
    time.tzset()
    os.chdir(run["folder"])
    sys.argv = ["dbt", *run["args"]]
    functions = sys.modules.get("dbt_common.events.functions")
    if functions is not None:
        functions.reset_metadata_vars()


def become_run(run: dict[str, Any], manifest: Any) -> NoReturn:
    code = 70
    try:
        os.setsid()
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        gc.enable()
        take_place(run)
        from dbt.cli.main import dbtRunner

        outcome = dbtRunner(manifest=manifest).invoke(run["args"])
        code = 0 if outcome.success else 1
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    os._exit(code)


if __name__ == "__main__":
    main()
