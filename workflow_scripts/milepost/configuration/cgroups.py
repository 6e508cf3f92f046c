"""What the kernel lets this process have of its machine: the limits of its control groups, as containers and Slurm set.

A process is in one group of each hierarchy, and the limits of all groups above it hold as well. Version 2 has a single
hierarchy, version 1 one for each controller, and both may be mounted at once (cgroups(7)).
"""

import os
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 2**60  # bytes; version 1 writes a number near 2**63 where there is no limit


def memory_limit(process: Path = Path("/proc/self")) -> int | None:
    """The memory in bytes that this process may take; None without a limit."""
    found = [
        int(text)
        for folder, is_v2 in _groups(process, "memory")
        if (text := _read(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes"))).isdecimal()
    ]
    return min((limit for limit in found if limit < UNLIMITED), default=None)


def installed_memory() -> int:
    """The memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_memory() -> int:
    """What of it a cgroup leaves this process, in bytes."""
    return min(installed_memory(), memory_limit() or installed_memory())


def cpu_limit(process: Path = Path("/proc/self")) -> float | None:
    """The cores whose time this process may take, which may be a part of one; None without a limit."""
    found = []
    for folder, is_v2 in _groups(process, "cpu"):
        if is_v2:
            quota, _, period = _read(folder / "cpu.max").partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # else "max", or -1
            found.append(int(quota) / int(period))
    return min(found, default=None)


def usable_cores() -> int:
    """The cores that this process may keep busy: those it may run on, or those whose time it may take."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, int(cpu_limit() or allowed)))


def _groups(process: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's group and of all above it, and whether they are of version 2."""
    own = {}  # controller, "" for version 2 -> path of the group within its hierarchy
    for line in _read(process / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    for line in _read(process / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        is_v2 = kind == "cgroup2"
        if not is_v2 and (kind != "cgroup" or controller not in options.split(" ")[-1].split(",")):
            continue
        path = own.get("" if is_v2 else controller)
        if path is None:
            continue
        root, mount = (Path(_unescaped(field)) for field in before.split(" ")[3:5])
        # A container sees its own group at the mount itself, whatever path the host gives it.
        inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
        for part in (inside, *inside.parents):
            yield mount / part, is_v2


def _unescaped(field: str) -> str:
    """A path as mountinfo writes it: blanks and backslashes as octal numbers."""
    for code in ("040", "011", "012", "134"):
        field = field.replace(f"\\{code}", chr(int(code, 8)))
    return field


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
