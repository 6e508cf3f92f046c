"""The workflow as a fresh clone has it, for tests to run and to edit."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ("Snakefile", "rules", "config", "profiles", "workflow_scripts")


def clone(folder: Path, *more: str) -> Path:
    """Copy the workflow, and what ``more`` names, into ``folder``, without the settings that a user keeps in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in (*WORKFLOW, *more):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("local.yaml"))
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder
