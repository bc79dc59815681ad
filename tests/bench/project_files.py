"""What it costs to look at all files of a project: `python -m tests.bench.project_files [FILES]`.

CPU of `dbt_child.project_files` before each fork from a manifest template, files at rest.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from dbtstream.dbt_child.project_files import RACY_NS, Places, first_change, take

ROUNDS = 20
PER_FOLDER = 100


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            model = Path(folder) / "models" / f"part_{number // PER_FOLDER}" / f"m_{number}.sql"
            model.parent.mkdir(parents=True, exist_ok=True)
            model.write_text(f"select {number} as id -- {'x' * 300}\n", encoding="utf-8")
        places = Places([f"{folder}/dbt_project.yml"], [f"{folder}/models"], [])
        known = take(places)
        time.sleep(RACY_NS / 1e9 + 0.1)
        assert first_change(known, places) is None
        spent = []
        for _ in range(ROUNDS):
            began = time.process_time()
            first_change(known, places)
            spent.append((time.process_time() - began) * 1000)
        middle, least, most = statistics.median(spent), min(spent), max(spent)
        print(f"{count} files: {middle:.1f} ms ({least:.1f} … {most:.1f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
