"""Write the report: one HTML page with scores, differences, plots, samples, settings and sources."""

import sys
from collections.abc import Sequence
from pathlib import Path

from milepost.checkpoints.manifest import Manifest, read_manifest
from milepost.common.errors import run
from milepost.common.files import atomic_write
from milepost.common.jobs import job_parser
from milepost.configuration.schema import Plots
from milepost.evaluation.overlap import overlap
from milepost.reporting.report import report_page
from milepost.reporting.results import Score, Training, pairs, read_scores, read_trainings


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="manifests of evaluations")
    parser.add_argument("--trainings", type=Path, nargs="*", default=[], help="manifests of trainings")
    parser.add_argument("--plots", type=Path, required=True, help="the manifest of the plots")
    parser.add_argument(
        "--sources", type=Path, nargs="*", default=[], help="manifests of downloads and data sets, to list the sources"
    )
    parser.add_argument("--html", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    scores, plots = read_scores(arguments.scores), read_manifest(arguments.plots).require()
    trainings, sources = read_trainings(arguments.trainings), [read_manifest(path) for path in arguments.sources]
    overlaps = overlaps_of(scores, trainings, sources)
    for sentence in overlaps:
        print(f"warning: {sentence}", file=sys.stderr)
    page = report_page(
        scores,
        pairs(scores, arguments.job["config"].get("compare", ())),
        trainings,
        plots,
        sources,
        Plots.model_validate(plots.provenance["config"]["plots"]),
        overlaps,
    )
    atomic_write(arguments.html, page)


def overlaps_of(scores: Sequence[Score], trainings: Sequence[Training], sources: Sequence[Manifest]) -> list[str]:
    """A sentence (`overlap`) for each training set that shares prompts with a set its model is scored on."""
    sets = {source.path.stem: source for source in sources if "rows" in source.facts}
    wanted = {}
    for training in trainings:
        trained_on = training.datasets
        scored_on = [score.dataset for score in scores if score.model == training.model]
        if training.settings["validation"]["interval"]:
            scored_on.append(training.settings["validation"]["dataset"])
        wanted |= {(name, scored): None for name in trained_on for scored in scored_on}
    found = [overlap(sets[training], sets[scored]) for training, scored in wanted if {training, scored} <= sets.keys()]
    return [sentence for sentence in found if sentence]


if __name__ == "__main__":
    run(main)
