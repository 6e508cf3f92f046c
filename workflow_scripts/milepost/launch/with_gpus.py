"""Run a command with exclusive GPUs: no other job of this user on this machine gets them until the command ends.

    python -P -m milepost.launch.with_gpus COUNT COMMAND...

Each GPU has a lock file. The command replaces this process (exec) and inherits the locks, so they are released however
it ends. It sees only its own GPUs, through CUDA_VISIBLE_DEVICES; a value that the user has set limits the choice.
"""

import fcntl
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from milepost.common.errors import UserError, run
from milepost.configuration.gpus import select, uuids

LOCKS = Path("/tmp", f"milepost-gpus-{os.getuid()}")
POLL_SECONDS = 0.5


def main() -> None:
    count, command = int(sys.argv[1]), sys.argv[2:]
    chosen = take(count, visible_devices(count)) if count else []
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order of nvidia-smi
    if not count:
        os.environ.setdefault(
            "TORCHDYNAMO_DISABLE", "1"
        )  # nothing is compiled on a CPU, and importing dynamo takes seconds
    os.execvp(command[0], command)


def visible_devices(count: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES entry -> unique identifier of each visible GPU.

    The identifier is the UUID from nvidia-smi, since jobs may number the same GPUs differently (in containers, under
    Slurm). Without nvidia-smi, ``count`` GPUs are assumed.
    """
    known = uuids()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return {str(index): uuid for index, uuid in enumerate(known or map(str, range(count)))}
    entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
    if not known or listed.startswith("MIG-"):
        return {entry: entry for entry in entries}
    return dict(zip(entries, select(listed, known), strict=False))  # the first invalid entry ends the list


def take(count: int, devices: Mapping[str, str]) -> list[str]:
    """Lock ``count`` of ``devices`` for the life of this process, waiting until that many are free."""
    if len(devices) < count:
        raise UserError(
            f"{count} GPUs are needed, but only {len(devices)} are visible (CUDA_VISIBLE_DEVICES:"
            f" {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): lower hardware.gpus or evaluation.gpus"
        )
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    announced = False
    with (LOCKS / "choosing.lock").open("a") as choosing:
        fcntl.flock(
            choosing, fcntl.LOCK_EX
        )  # one job chooses at a time, so that one that needs many GPUs does not starve
        while True:
            taken = {}
            for entry, identity in devices.items():
                lock = os.open(LOCKS / f"{identity}.lock", os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(lock)
                    continue
                taken[entry] = lock
                if len(taken) == count:
                    for lock in taken.values():
                        os.set_inheritable(lock, True)
                    return [*taken]
            for lock in taken.values():
                os.close(lock)
            if not announced:
                print(f"GPUs are in use: waiting until {count} of {','.join(devices)} are free", file=sys.stderr)
                announced = True
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    run(main)
