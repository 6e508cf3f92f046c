"""Write a page on how the trainings go that are running or finished, without waiting for them or touching them."""

from pathlib import Path

from milepost.common.errors import run
from milepost.common.files import atomic_write
from milepost.common.jobs import job_parser
from milepost.configuration.schema import Plots
from milepost.reporting.progress import progress_page
from milepost.reporting.results import read_trainings, read_unfinished


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--results", type=Path, required=True, help="the folder of all results")
    parser.add_argument("--html", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    config = arguments.job["config"]
    trainings, not_begun = [], []
    for model, name in config["trainings"]:
        manifest = arguments.results / model / "grpo" / name / "train.json"
        job = arguments.results / "jobs" / manifest.relative_to(arguments.results)
        found = read_trainings([manifest])[0] if manifest.is_file() else read_unfinished(manifest, job)
        if found:
            trainings.append(found)
        else:
            not_begun.append(f"{model}/{name}")
    atomic_write(arguments.html, progress_page(trainings, not_begun, Plots.model_validate(config["plots"])))
    print(f"{arguments.html}: open it in a browser")


if __name__ == "__main__":
    run(main)
