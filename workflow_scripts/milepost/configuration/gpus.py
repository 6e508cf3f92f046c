"""List the GPUs that a job started here would see. Asks the driver, since importing torch takes seconds."""

import os
import re
import subprocess
from collections.abc import Sequence

UUID = re.compile(r"\(UUID: ((?:GPU|MIG)-[^)]+)\)")  # of nvidia-smi -L: MIG 1g.10gb  Device  0: (UUID: MIG-...)
SLICE = re.compile(r"MIG \S*\b(\d+)gb\b")


def visible_gpus() -> tuple[float | None, ...]:
    """Memory in GiB of each GPU that CUDA would enumerate, in that order; empty if no driver answers.

    None stands for a GPU whose memory the driver does not report (``[N/A]``), such as one that shares the host's.
    If a visible GPU is split into MIG slices, CUDA enumerates only the first slice (MIG user guide, "CUDA Device
    Enumeration"); a GPU in MIG mode without slices is not enumerated.
    """
    rows = _rows()
    gpus = {uuid: _gib(mebibytes) for uuid, mebibytes, _ in rows}
    cut = {uuid for uuid, _, mode in rows if mode == "Enabled"}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    slices = _slices() if cut or (listed or "").startswith("MIG-") else {}
    sizes = {uuid: gib for of_gpu in slices.values() for uuid, gib in of_gpu.items()}
    if listed is not None and listed.startswith("MIG-"):
        return tuple(sizes[uuid] for uuid in select(listed, [*sizes])[:1])
    seen = [*gpus] if listed is None else select(listed, [*gpus])
    of_seen = [gib for uuid in seen for gib in slices.get(uuid, {}).values()]
    return tuple(of_seen[:1] or (gpus[uuid] for uuid in seen if uuid not in cut))


def uuids() -> list[str]:
    """All GPUs of this machine in the driver's order, visible or not; empty if no driver answers."""
    return [uuid for uuid, *_ in _rows()]


def _rows() -> list[list[str]]:
    """UUID, memory in MiB and MIG mode of each GPU, as nvidia-smi prints them."""
    answer = _nvidia_smi("--query-gpu=uuid,memory.total,mig.mode.current", "--format=csv,noheader,nounits")
    return [line.split(", ") for line in answer.splitlines() if line.startswith("GPU-") and line.count(", ") == 2]


def _gib(mebibytes: str) -> float | None:
    return float(mebibytes) / 1024 if mebibytes.strip().isdecimal() else None


def _slices() -> dict[str, dict[str, float]]:
    """The MIG slices of each GPU: UUID of the GPU -> UUID of the slice -> memory in GiB."""
    slices: dict[str, dict[str, float]] = {}
    of_gpu: dict[str, float] = {}
    for line in _nvidia_smi("-L").splitlines():
        if not (uuid := UUID.search(line)):
            continue
        if size := SLICE.search(line):
            of_gpu[uuid[1]] = float(size[1])
        else:
            of_gpu = slices.setdefault(uuid[1], {})
    return slices


def select(listed: str, uuids: Sequence[str]) -> list[str]:
    """The devices of ``uuids``, in the driver's order, that a value of CUDA_VISIBLE_DEVICES selects.

    The value lists indices, or UUIDs or their beginnings. The first entry that is neither, or matches several devices,
    ends the list; if a device is listed twice, none is selected. (CUDA programming guide, section 5.2.1.1; where it is
    silent, as observed of the driver.)
    """
    by_uuid = listed.startswith(("GPU-", "MIG-"))
    selected: list[str] = []
    for entry in listed.split(","):
        device = _by_uuid(entry, uuids) if by_uuid else _by_index(entry, uuids)
        if device is None:
            break
        if device in selected:
            return []
        selected.append(device)
    return selected


def _by_uuid(entry: str, uuids: Sequence[str]) -> str | None:
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    found = [uuid for uuid in uuids if uuid.lower().startswith(entry.lower()[: len(uuid)])]
    return found[0] if len(found) == 1 else None


def _by_index(entry: str, uuids: Sequence[str]) -> str | None:
    number = re.match(r"\s*\+?(\d+)", entry)  # the rest is ignored: 1x is 1
    return uuids[int(number[1])] if number and int(number[1]) < len(uuids) else None


def _nvidia_smi(*arguments: str) -> str:
    """The output of nvidia-smi; empty if there is none or it fails."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
