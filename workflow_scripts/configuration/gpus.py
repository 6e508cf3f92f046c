"""The GPUs that a job started here would see, asked of the driver: importing torch takes seconds."""

import os
import re
import subprocess
from collections.abc import Sequence

SLICE = re.compile(r"MIG \S*\b(\d+)gb\b.*\(UUID: (MIG-[^)]+)\)")  # MIG 1g.10gb  Device  0: (UUID: MIG-...)


def visible_gpus() -> tuple[float, ...]:
    """Memory in GiB of each GPU that CUDA would enumerate, in that order; none where no driver answers."""
    answer = _nvidia_smi("--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in answer.splitlines() if line.count(",") == 1]
    gpus = {uuid: float(mebibytes) / 1024 for uuid, mebibytes in rows}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return tuple(gpus.values())
    if listed.startswith("MIG-"):
        slices = {uuid: float(gigabytes) for gigabytes, uuid in SLICE.findall(_nvidia_smi("-L"))}
        return tuple(slices[uuid] for uuid in select(listed, [*slices])[:1])  # a process sees one slice at most
    return tuple(gpus[uuid] for uuid in select(listed, [*gpus]))


def select(listed: str, uuids: Sequence[str]) -> list[str]:
    """The devices, out of ``uuids`` in the driver's order, that a value of CUDA_VISIBLE_DEVICES selects.

    It lists indices, or UUIDs of which the beginning is enough. The first entry that is neither, or fits several
    devices, ends the list; a device that is listed twice leaves none. (CUDA programming guide, section 5.2.1.1; where
    it says nothing, as the driver was seen to do.)
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
    """What the driver's tool prints; nothing where there is none, or it fails."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
