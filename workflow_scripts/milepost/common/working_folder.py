"""Remove Snakemake's stale locks, which survive a kill or a power cut and then block every later run."""

import sys
from pathlib import Path
from typing import IO

from milepost.common.files import try_lock


def claim(folder: Path) -> IO[str]:
    """Claim Snakemake's folder (``.snakemake``) for as long as the returned file is open.

    If no other run has claimed it, any locks in it are left over from a killed run and are removed. Otherwise the other
    run is named and its locks stay, so that Snakemake refuses to make the same files twice.
    """
    folder.mkdir(exist_ok=True)
    mine = (folder / "milepost.lock").open("a+")
    if holder := try_lock(mine):
        print(f"note: {holder} is running in {folder.absolute().parent}", file=sys.stderr)
        return mine
    for lock in folder.glob("locks/*"):
        lock.unlink(missing_ok=True)
    return mine
