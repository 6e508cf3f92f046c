"""The limits of control groups, as the kernel's files show them inside and outside containers."""

from pathlib import Path

import pytest

from milepost.configuration.cgroups import cpu_limit, memory_limit, usable_cores

GIB = 2**30
V2 = "30 23 0:26 {root} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "31 24 0:27 {root} {mount}/{name} rw,nosuid - cgroup cgroup rw,{name}"


@pytest.fixture
def machine(tmp_path):
    """A process's view: ``machine(cgroup, mountinfo, {file below the mount: content})`` -> its folder in /proc."""

    def make(cgroup: str, mountinfo: list[str], files: dict[str, str]) -> Path:
        process, mount = tmp_path / "self", tmp_path / "sys fs"
        process.mkdir()
        (process / "cgroup").write_text(cgroup)
        shown = str(mount).replace(" ", "\\040")
        (process / "mountinfo").write_text("\n".join(line.replace("{mount}", shown) for line in mountinfo) + "\n")
        for name, content in files.items():
            (mount / name).parent.mkdir(parents=True, exist_ok=True)
            (mount / name).write_text(content + "\n")
        return process

    return make


def v2(root: str = "/") -> list[str]:
    return ["22 1 8:1 / / rw - ext4 /dev/sda1 rw", V2.replace("{root}", root)]


def v1(*names: str, root: str = "/") -> list[str]:
    return [V1.replace("{root}", root).replace("{name}", name) for name in names]


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "files", "memory", "cores"),
    [
        ("0::/", v2(), {}, None, None),
        ("0::/", v2(), {"memory.max": "max", "cpu.max": "max 100000"}, None, None),
        ("0::/", v2(), {"memory.max": str(8 * GIB), "cpu.max": "150000 100000"}, 8, 1.5),
        # The strictest limit of nested groups, at any level.
        (
            "0::/a/b",
            v2(),
            {"a/memory.max": str(4 * GIB), "a/b/memory.max": str(8 * GIB), "a/b/cpu.max": "max 1"},
            4,
            None,
        ),
        ("0::/a/b", v2(), {"a/memory.max": "max", "a/b/memory.max": str(8 * GIB), "a/cpu.max": "400000 100000"}, 8, 4),
        ("0::/a/b", v2(), {"c/memory.max": str(GIB)}, None, None),
        # In a container: the host's path, of which the mount shows only the end, or a path outside the mount.
        ("0::/docker/1f", v2("/docker/1f"), {"memory.max": str(2 * GIB)}, 2, None),
        ("0::/docker/1f/job", v2("/docker/1f"), {"memory.max": str(2 * GIB), "job/memory.max": str(GIB)}, 1, None),
        ("0::/../other", v2(), {"memory.max": str(2 * GIB)}, 2, None),
        (
            "5:memory:/slurm/job_7\n4:cpu,cpuacct:/slurm\n1:name=systemd:/",
            v1("memory", "cpu", "cpuacct"),
            {
                "memory/slurm/job_7/memory.limit_in_bytes": "9223372036854771712",
                "memory/slurm/memory.limit_in_bytes": str(3 * GIB),
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "cpu/slurm/cpu.cfs_quota_us": "250000",
                "cpu/slurm/cpu.cfs_period_us": "100000",
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
            },
            3,
            2.5,
        ),
        # Version 1 with an empty version 2.
        ("5:memory:/\n0::/", [*v1("memory"), *v2()], {"memory/memory.limit_in_bytes": str(GIB)}, 1, None),
        ("5:memory:/", v1("memory"), {"memory/memory.limit_in_bytes": "9223372036854771712"}, None, None),
        ("5:memory:/", v1("memory", root="/docker/1f"), {"memory/memory.limit_in_bytes": str(GIB)}, 1, None),
        ("", [], {}, None, None),
    ],
)
def test_the_narrowest_limit_counts(machine, cgroup, mountinfo, files, memory, cores):
    process = machine(cgroup, mountinfo, files)
    assert memory_limit(process) == (memory and memory * GIB)
    assert cpu_limit(process) == cores


def test_a_system_without_control_groups_has_no_limit(tmp_path):
    assert memory_limit(tmp_path) is None
    assert cpu_limit(tmp_path) is None


@pytest.mark.parametrize(("limit", "cores"), [(None, 4), (1.5, 1), (0.5, 1), (2.0, 2), (64.0, 4)])
def test_cores_are_counted_whole_and_at_least_one(monkeypatch, limit, cores):
    monkeypatch.setattr("milepost.configuration.cgroups.cpu_limit", lambda: limit)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3})
    assert usable_cores() == cores
