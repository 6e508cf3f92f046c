"""Preflight counts the GPUs that CUDA enumerates, and jobs choose among them."""

import os
import stat

import pytest

from milepost.configuration.gpus import select, visible_gpus
from milepost.launch.with_gpus import visible_devices

FIRST, SECOND = "GPU-eece32e0-78ca-bbba-7c9b-aaaff290d068", "GPU-e5e9b19d-3c11-bc20-ba77-2757474a9da3"
UNKNOWN = "GPU-0123456789ab"
SLICES = ["MIG-4b1c2d3e-0000-5000-8000-000000000001", "MIG-5c6d7e8f-0000-5000-8000-000000000002"]

# What the driver of a node with the GPUs FIRST and SECOND enumerated.
ENUMERATED = [
    ("", []),
    ("-1", []),
    ("0", [FIRST]),
    ("1,0", [SECOND, FIRST]),
    ("0,1,-1", [FIRST, SECOND]),
    ("0,-1,1", [FIRST]),
    ("-2,1", []),
    ("0,9,1", [FIRST]),
    ("0,,1", [FIRST]),
    (",0", []),
    ("0,x,1", [FIRST]),
    (" 1 , 0", [SECOND, FIRST]),
    ("+1", [SECOND]),
    ("01", [SECOND]),
    ("1gpu,0", [SECOND, FIRST]),
    ("0x1", [FIRST]),
    ("1;0", [SECOND]),
    ("0,0", []),
    ("0,1,0", []),
    ("all", []),
    (FIRST, [FIRST]),
    (FIRST.upper(), [FIRST]),
    (f"{SECOND},{FIRST}", [SECOND, FIRST]),
    (f"{FIRST} ,{SECOND}", [FIRST, SECOND]),
    (f"{FIRST}, {SECOND}", [FIRST]),
    ("GPU-ee", [FIRST]),
    (f"GPU-e5,{FIRST}", [SECOND, FIRST]),
    ("GPU-e", []),  # fits both
    ("GPU-", []),
    (FIRST.removeprefix("GPU-"), []),
    (f"{FIRST},{UNKNOWN},{SECOND}", [FIRST]),
    (f"{FIRST},-1,{SECOND}", [FIRST]),
    (f"{FIRST},1", [FIRST]),
    (f"0,{SECOND}", [FIRST]),
    (f"{FIRST},{FIRST}", []),
    (f"{FIRST},GPU-ee", []),
]


@pytest.mark.parametrize(("listed", "enumerated"), ENUMERATED)
def test_what_a_list_selects_is_what_the_driver_enumerates(listed, enumerated):
    assert select(listed, [FIRST, SECOND]) == enumerated


def test_an_empty_entry_is_no_prefix_of_the_only_gpu():
    assert select(f"{FIRST},", [FIRST]) == [FIRST]


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A machine with two GPUs, the second in slices, and an nvidia-smi that reports them."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        f"""#!/bin/sh
case "$*" in
  "--query-gpu=uuid,memory.total,mig.mode.current --format=csv,noheader,nounits")
    echo "{FIRST}, ${{FIRST_MEMORY:-81920}}, ${{FIRST_MODE:-Disabled}}"
    echo "{SECOND}, 40960, ${{SECOND_MODE:-Enabled}}" ;;
  -L)
    echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: {FIRST})"
    echo "GPU 1: NVIDIA A100-SXM4-40GB (UUID: {SECOND})"
    echo "  MIG 3g.20gb     Device  0: (UUID: {SLICES[0]})"
    echo "  MIG 1c.1g.5gb+me Device  1: (UUID: {SLICES[1]})" ;;
  *) exit 1 ;;
esac
"""
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tool


@pytest.mark.parametrize(
    ("visible", "memory"),
    [
        (None, (20,)),  # of a sliced GPU, CUDA enumerates only the first slice, and then no whole GPU
        ("", ()),
        ("-1", ()),
        ("0", (80,)),
        ("1", (20,)),
        ("1,0", (20,)),
        ("1,-1,0", (20,)),
        ("0,0", ()),
        ("GPU-e5", (20,)),
        (f"{SECOND},{FIRST}", (20,)),
        (SLICES[0], (20,)),
        ("MIG-5c", (5,)),
        (",".join(SLICES), (20,)),  # CUDA enumerates one slice
        ("MIG-unknown", ()),
    ],
)
def test_of_a_sliced_gpu_only_one_slice_is_counted(node, monkeypatch, visible, memory):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == memory


@pytest.mark.parametrize("mode", ["Disabled", "[N/A]"])
@pytest.mark.parametrize(
    ("visible", "memory"), [(None, (80, 40)), ("1,0", (40, 80)), ("GPU-e5", (40,)), (f"{SECOND},GPU-ee", (40, 80))]
)
def test_whole_gpus_are_counted_with_their_memory(node, monkeypatch, visible, memory, mode):
    """With MIG disabled, and without support for it."""
    monkeypatch.setenv("SECOND_MODE", mode)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == memory


def test_a_gpu_in_mig_mode_without_slices_is_not_counted(node, monkeypatch):
    monkeypatch.setenv("FIRST_MODE", "Enabled")
    monkeypatch.setenv("SECOND_MODE", "Disabled")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_gpus() == ()


@pytest.mark.parametrize("untold", ["[N/A]", "[Not Supported]", "[Unknown Error]"])
def test_a_gpu_whose_memory_is_not_reported_is_still_counted(node, monkeypatch, untold):
    monkeypatch.setenv("FIRST_MEMORY", untold)
    monkeypatch.setenv("SECOND_MODE", "Disabled")
    assert visible_gpus() == (None, 40)


@pytest.mark.parametrize("fault", ["absent", "failing"])
def test_without_a_driver_there_are_no_gpus(node, monkeypatch, fault):
    if fault == "absent":
        monkeypatch.setenv("PATH", str(node.parent / "empty"))
    else:
        node.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, it could not communicate with the driver.'\nexit 9\n")
    assert visible_gpus() == ()


def test_a_job_may_choose_from_the_gpus_that_preflight_counts(node, monkeypatch):
    """Whatever the list holds."""
    for listed, enumerated in ENUMERATED:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert list(visible_devices(2).values()) == enumerated, listed
