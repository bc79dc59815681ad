"""Write the JSON of the dashboard and the monitors."""

import json
import sys
from pathlib import Path

from deploy.datadog.source import documents

FOLDER = Path(__file__).parents[1]


def rendered() -> dict[str, str]:
    return {
        name: json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for name, document in documents().items()
    }


def main() -> None:
    files = rendered()
    (FOLDER / "monitors").mkdir(exist_ok=True)
    for old in (FOLDER / "monitors").glob("*.json"):
        old.unlink()
    for name, text in files.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(files)} files in {FOLDER}\n")


if __name__ == "__main__":
    main()
