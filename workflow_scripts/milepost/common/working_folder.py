"""Which Snakemake runs in a folder: its own lock outlives a kill or a power cut, and then refuses every later run."""

import sys
from pathlib import Path
from typing import IO

from milepost.common.files import try_lock


def claim(folder: Path) -> IO[str]:
    """Claim Snakemake's folder (``.snakemake``) for as long as the returned file is open.

    Where no other run has a claim, locks that lie there were left by one that was killed, and go. Where one has, it is
    named; its locks stay, and Snakemake refuses to make the same files twice.
    """
    folder.mkdir(exist_ok=True)
    mine = (folder / "milepost.lock").open("a+")
    if holder := try_lock(mine):
        print(f"note: {holder} is at work in {folder.absolute().parent}", file=sys.stderr)
        return mine
    for lock in folder.glob("locks/*"):
        lock.unlink(missing_ok=True)
    return mine
