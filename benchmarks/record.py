"""Record each figure as a line of JSON: the measurement, hardware, command and package versions."""

import json
import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from milepost.checkpoints.manifest import versions

RESULTS = Path(__file__).parent / "results"
COMMAND = shlex.join(["python", *sys.argv])  # read at import: a script that runs in this process changes sys.argv


def processor() -> str:
    """The processor's name, number of cores, and the widest vectors that torch uses on it."""
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    name = names[0] if names else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {name}, {torch.backends.cpu.get_cpu_capability()}"


def record(name: str, model: str, value: float, unit: str, *, gpus: int = 0, file: str | None = None, **note) -> None:
    """Append a figure to ``results/<file or name>.jsonl`` and print it; ``note`` describes the conditions."""
    line = {
        "name": name,
        "model": model,
        "gpus": gpus,
        "hardware": torch.cuda.get_device_name() if gpus else processor(),
        "value": float(f"{value:.5g}"),
        "unit": unit,
        "command": COMMAND,
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "note": note,
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{file or name}.jsonl").open("a", encoding="utf-8") as results:
        results.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{name} {model}: {line['value']} {unit} {json.dumps(note)}", flush=True)
