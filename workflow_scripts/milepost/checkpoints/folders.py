"""Atomic folders, either complete or absent: filled under a temporary name, synced, then renamed."""

import os
import shutil
from pathlib import Path

from milepost.common.files import sync_folder


def partial_folder(folder: Path | str) -> Path:
    """The temporary name under which ``folder`` is filled; the same for every process."""
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.partial")


def start_folder(partial: Path) -> None:
    """Create an empty ``partial``; removes what an interrupted run left there."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def finish_folder(partial: Path, folder: Path | str) -> None:
    """Sync ``partial`` and rename it to ``folder``; an old ``folder`` is removed only after that."""
    folder = Path(folder)
    for path in [*partial.rglob("*"), partial]:
        if path.is_dir():
            sync_folder(path)
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
