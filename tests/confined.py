"""Start a command as a unit file would: `python confined.py UNIT --write DIR … -- COMMAND …`

A test machine runs no systemd, so this does what the lines of the unit say that can break a
Python program: ProtectSystem=strict, CapabilityBoundingSet=, NoNewPrivileges=, UMask=,
MemoryDenyWriteExecute= and SystemCallFilter= (with the sets of systemd-analyze, through
libseccomp). It needs root and Linux 6.3. What the other lines close, it leaves open.
"""

import ctypes
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

# linux/prctl.h
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_MDWE, PR_GET_MDWE = 24, 38, 65, 66
PR_MDWE_REFUSE_EXEC_GAIN = 1
# sched.h, sys/mount.h
CLONE_NEWNS = 0x20000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
# seccomp.h
SCMP_ACT_ALLOW, SCMP_ACT_ERRNO = 0x7FFF0000, 0x00050000

libc = ctypes.CDLL(None, use_errno=True)


def can_confine() -> bool:
    return (
        sys.platform == "linux"
        and os.geteuid() == 0
        and libc.prctl(PR_GET_MDWE, 0, 0, 0, 0) >= 0
        and any(Path(folder, "systemd-analyze").exists() for folder in ("/usr/bin", "/bin"))
    )


def settings(unit: Path) -> dict[str, list[str]]:
    """Each key of the unit with all that it is set to."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def confine(unit: dict[str, list[str]], writable: list[str]) -> None:
    allowed = syscalls(unit["SystemCallFilter"])  # asks systemd-analyze: before anything is closed
    if unit["ProtectSystem"] == ["strict"]:
        read_only_root(writable)
    if unit["CapabilityBoundingSet"] == [""]:
        drop_capabilities()
    if unit["NoNewPrivileges"] == ["yes"]:
        checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if unit["MemoryDenyWriteExecute"] == ["yes"]:
        checked(libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0))
    os.umask(int(unit["UMask"][0], 8))
    filter_syscalls(allowed, getattr(errno, unit["SystemCallErrorNumber"][0]))


def read_only_root(writable: list[str]) -> None:
    checked(libc.unshare(CLONE_NEWNS))
    mount("/", MS_REC | MS_PRIVATE)
    for folder in writable:
        mount(folder, MS_BIND)
    mount("/", MS_REMOUNT | MS_BIND | MS_RDONLY)


def mount(folder: str, flags: int) -> None:
    path = folder.encode()
    checked(libc.mount(path, path, None, ctypes.c_ulong(flags), None))


def drop_capabilities() -> None:
    """From the bounding set: the next exec has none, be it root's."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="utf-8"))
    for capability in range(last + 1):
        checked(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))


def syscalls(rules: list[str]) -> set[str]:
    """What `SystemCallFilter=` lines leave: a first list that allows, and lists with ~ off it."""
    sets = dict(known_sets())

    def expanded(words: list[str]) -> Iterator[str]:
        for word in words:
            if word.startswith("@"):
                yield from expanded(sets[word])
            else:
                yield word

    first, *others = rules
    left = set(expanded(first.split()))
    for rule in others:
        left -= set(expanded(rule.removeprefix("~").split()))
    return left


def known_sets() -> Iterator[tuple[str, list[str]]]:
    done = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager"],
        capture_output=True,
        text=True,
        check=True,
    )
    for text in done.stdout.split("\n\n"):
        name, *members = [line.strip() for line in text.splitlines() if "#" not in line] or [""]
        if name.startswith("@"):
            yield name, members


def filter_syscalls(allowed: set[str], number: int) -> None:
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(SCMP_ACT_ERRNO | number))
    for name in sorted(allowed):
        resolved = seccomp.seccomp_syscall_resolve_name(name.encode())
        if resolved >= 0:  # not one of another architecture
            checked(seccomp.seccomp_rule_add(context, SCMP_ACT_ALLOW, resolved, 0))
    checked(seccomp.seccomp_load(context))


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno() or -result, os.strerror(ctypes.get_errno() or -result))


def main(arguments: list[str]) -> None:
    split = arguments.index("--")
    unit, *options = arguments[:split]
    command = arguments[split + 1 :]
    confine(settings(Path(unit)), [word for word in options if word != "--write"])
    os.execv(command[0], command)  # noqa: S606  # that is what it is for


if __name__ == "__main__":
    main(sys.argv[1:])
