"""Write the JSON of the dashboards."""

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana.source import DASHBOARDS

FOLDER = Path(__file__).parents[1] / "dashboards"


def rendered() -> dict[str, str]:
    encoder = JSONEncoder(indent=2, sort_keys=True, ensure_ascii=False)
    return {name: encoder.encode(build()) + "\n" for name, build in DASHBOARDS.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(DASHBOARDS)} dashboards in {FOLDER}\n")


if __name__ == "__main__":
    main()
