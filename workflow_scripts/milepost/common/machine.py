"""What a result was made on, for its manifest."""

import os
from collections import Counter
from pathlib import Path


def machine() -> str:
    """This machine in words, such as ``8 NVIDIA H200, 128 cores of Intel(R) Xeon(R) Platinum 8480C``."""
    gpus = Counter(
        model
        for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        if (model := _value(file, "Model"))
    )
    cores = len(os.sched_getaffinity(0))
    processor = _value(Path("/proc/cpuinfo"), "model name") or os.uname().machine
    parts = [*(f"{count} {model}" for model, count in gpus.items()), f"{cores} cores of {processor}"]
    return ", ".join(parts)


def _value(file: Path, key: str) -> str:
    """The first value of a key in a file of the kernel's; empty if there is none."""
    try:
        lines = [line.partition(":") for line in file.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")
