"""Start: `python <this folder> --fd N`, or `--template N MAX_RUNS` for what runs are forked from.

Makes the folder one package, and leaves no trace.

Python puts the folder itself on `sys.path`, where its modules would shadow others; the `dbt`
command has neither it nor the working directory there, so neither have we.
"""

import importlib
import importlib.util
import os
import sys

PACKAGE = "dbtstream_child"  # not dbt_*: dbt imports such top-level modules as its plugins


def load_package(folder: str) -> None:
    init = os.path.join(folder, "__init__.py")
    spec = importlib.util.spec_from_file_location(
        PACKAGE, init, submodule_search_locations=[folder]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {init}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    load_package(here)
    story = ".template" if sys.argv[1:2] == ["--template"] else ".main"
    importlib.import_module(PACKAGE + story).main(sys.argv[1:])
