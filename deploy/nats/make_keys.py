"""Keys for the roles of roles.conf: seeds for the clients, keys.conf for the server.

    python make_keys.py /etc/nats

For each `$KEY_<ROLE>` that roles.conf in that folder uses and keys.conf does not have, it makes
the seed `<role>.nk`, readable by its owner only, and writes the public key to keys.conf. What is
there stays. Give each seed to its client and keep none here: the server does not need them.
To replace a key, remove its line in keys.conf and its seed, run this, and reload the server.

It needs the package `nkeys`, which comes with dbtstream.
"""

import os
import re
import sys
from pathlib import Path

import nkeys  # type: ignore[import-untyped]  # it ships no types


def make_keys(folder: Path) -> list[Path]:
    """The seed files that it wrote."""
    keys_file = folder / "keys.conf"
    keys = dict(re.findall(r"^KEY_(\w+): (\w+)", _text(keys_file), re.MULTILINE))
    made = []
    for role in re.findall(r"^[^#\n]*\$KEY_(\w+)", _text(folder / "roles.conf"), re.MULTILINE):
        if role not in keys:
            seed_file = folder / f"{role.lower()}.nk"
            keys[role] = _new_key(seed_file)
            made.append(seed_file)
    lines = (f"KEY_{role}: {key}\n" for role, key in keys.items())
    keys_file.write_text("# Written by make_keys.py\n" + "".join(lines), encoding="utf-8")
    return made


def _new_key(seed_file: Path) -> str:
    """Its public half. Never writes over a seed that somebody may be using."""
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    with os.fdopen(os.open(seed_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(seed + b"\n")
    public: bytes = nkeys.from_seed(bytearray(seed)).public_key
    return public.decode()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    for path in make_keys(Path(sys.argv[1] if len(sys.argv) > 1 else ".")):
        sys.stdout.write(f"{path}\n")
