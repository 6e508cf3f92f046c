"""Read a job's settings from the JSON file that the workflow writes before the first job."""

import argparse
from pathlib import Path
from typing import Any

from milepost.common.contents import content_of
from milepost.common.errors import UserError
from milepost.common.files import read_json


def job_parser(description: str | None) -> argparse.ArgumentParser:
    """An entry script's argument parser; ``arguments.job`` is what `read_job` returns."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--job", type=read_job, required=True, help="the job's settings: a JSON file (config, code, upstream)"
    )
    return parser


def read_job(path: Path | str) -> dict[str, Any]:
    """Read the job file that `configuration.provenance.Provenance.job` wrote; ``config`` holds the job's settings.

    Adds ``inputs``, the content digest of each manifest that ``upstream`` names. A missing file is a `UserError`.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file: Snakemake writes it at the start of a run: run without --no-hooks")
    job = read_json(path)
    if not isinstance(job, dict) or not isinstance(job.get("config"), dict):
        raise UserError(f"{path}: not a job file: run Snakemake again, which overwrites it")
    upstream = {name: read_json(manifest) for name, manifest in job.get("upstream", {}).items() if manifest}
    return job | {"inputs": {name: content_of(manifest) for name, manifest in upstream.items()}}
