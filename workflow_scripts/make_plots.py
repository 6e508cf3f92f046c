"""Draw the plots: PNG for papers and slides, light and dark SVG for the report."""

from pathlib import Path

from tqdm import tqdm

from milepost.checkpoints.manifest import write_manifest
from milepost.common.errors import run
from milepost.common.files import atomic_write
from milepost.common.jobs import job_parser
from milepost.configuration.schema import Plots
from milepost.reporting.plots import all_plots
from milepost.reporting.results import pairs, read_scores, read_trainings


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--scores", type=Path, nargs="*", default=[], help="manifests of evaluations")
    parser.add_argument("--trainings", type=Path, nargs="*", default=[], help="manifests of trainings")
    parser.add_argument("--folder", type=Path, required=True, help="folder of the drawings")
    parser.add_argument(
        "--manifest", type=Path, required=True, help="manifest to write: the drawings with their captions"
    )
    arguments = parser.parse_args()
    settings = Plots.model_validate(arguments.job["config"]["plots"])
    scores = read_scores(arguments.scores)
    compared = pairs(scores, arguments.job["config"].get("compare", ()))
    plots = all_plots(read_trainings(arguments.trainings), scores, compared)
    facts, files = [], []
    for plot in tqdm(plots, desc="plots", mininterval=1):
        names = {"png": f"{plot.name}.png", "light": f"{plot.name}.svg", "dark": f"{plot.name}-dark.svg"}
        for kind, content in plot.drawings(settings).items():
            atomic_write(arguments.folder / names[kind], content)
        facts.append({"title": plot.title, "caption": plot.caption, "model": plot.model} | names)
        files += names.values()
    for old in [*arguments.folder.glob("*.png"), *arguments.folder.glob("*.svg")]:
        if old.name not in files:  # of a model that is no longer listed
            old.unlink()
    write_manifest(arguments.manifest, "plots", arguments.folder, files, arguments.job, {"plots": facts})


if __name__ == "__main__":
    run(main)
