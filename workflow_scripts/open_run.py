"""Choose the folder that a training works in, that of a run to continue or of a new one, and print it.

If the run is finished already, write its manifest, so that the caller has nothing left to do.
"""

import sys
from pathlib import Path
from typing import Any

from milepost.checkpoints.manifest import rewrite_manifest, same_result
from milepost.common.errors import run
from milepost.common.files import hold
from milepost.common.jobs import job_parser
from milepost.configuration import runs


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="the folder of all runs of this name")
    parser.add_argument("--manifest", type=Path, required=True, help="the trained weights' manifest")
    arguments = parser.parse_args()
    job = arguments.job
    with hold(arguments.runs / "runs"):
        others = sorted(folder.name for folder in arguments.runs.glob("*") if (folder / runs.FILE).exists())
        folder = runs.open_run(arguments.runs, job)
    made_by = runs.made_by(folder)
    if others and folder.name not in others:
        print(
            f"{folder}: a new run, since its settings, code or data differ from those of {', '.join(others)};"
            " those stay",
            file=sys.stderr,
        )
    if len(made_by) > 1:
        print(f"{folder}: made by {makers(made_by)}", file=sys.stderr)
    by = () if job["on_code_change"] == "continue" else ("code", "versions")
    if same := same_result(folder, job, ("config", "inputs", *by)):
        print(f"{folder}: all {same.facts['rollouts']} rollouts are done: nothing to train", file=sys.stderr)
        rewrite_manifest(same, arguments.manifest, job)
    print(folder)


def makers(made_by: list[dict[str, Any]]) -> str:
    """Which commits (or code digests) made which rollouts of a run."""
    return ", ".join(f"{maker['commit'] or maker['code']} from rollout {maker['from_rollout']}" for maker in made_by)


if __name__ == "__main__":
    run(main)
