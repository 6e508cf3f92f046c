"""Remove Snakemake's stale locks, which outlive a kill or a power cut and then block every later run; keep others."""

import sys
from pathlib import Path
from typing import IO

from snakemake.persistence.file import FilePersistence

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


def keep_locks_of_others() -> None:
    """Let a run remove only its own locks at its end; Snakemake 9.27 removes those of all runs in the folder.

    ``snakemake --unlock`` still removes them all.
    """
    if FilePersistence._delete_locks is not _delete_own_locks:
        FilePersistence.cleanup_locks = FilePersistence._delete_locks
        FilePersistence._delete_locks = _delete_own_locks


def _delete_own_locks(persistence: FilePersistence) -> None:
    for lock in persistence._lockfile.values():
        Path(lock).unlink(missing_ok=True)
    persistence._lockfile.clear()
