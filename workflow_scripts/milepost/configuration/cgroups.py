"""Read the limits of memory and processor time that containers and Slurm set: those of this process's control groups.

A process is in one group of each hierarchy, and the limits of all groups above that one apply, too. Version 2 has a
single hierarchy, version 1 has one per controller, and both may be mounted at once (cgroups(7)).
"""

import os
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 2**60  # bytes; version 1 shows a number near 2**63 if there is no limit


def memory_limit(process: Path = Path("/proc/self")) -> int | None:
    """The memory limit of this process in bytes; None without a limit."""
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
    """The memory that this process can use, in bytes: all that is installed, or its limit."""
    return min(installed_memory(), memory_limit() or installed_memory())


def cpu_limit(process: Path = Path("/proc/self")) -> float | None:
    """The limit of processor time in cores, which may be a fraction; None without a limit."""
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
    """The number of cores that this process can keep busy, by its affinity and its limit."""
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
        # In a container, its own group is at the mount itself, whatever its path is on the host.
        inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
        for part in (inside, *inside.parents):
            yield mount / part, is_v2


def _unescaped(field: str) -> str:
    """Decode a path in mountinfo, where white space and backslashes are octal numbers."""
    for code in ("040", "011", "012", "134"):
        field = field.replace(f"\\{code}", chr(int(code, 8)))
    return field


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
