"""Write the report: one HTML page that holds scores, differences, plots, samples, settings and origins."""

import argparse
import json
from pathlib import Path

from checkpoints.manifest import read_manifest
from common.errors import run
from common.files import atomic_write
from configuration.schema import Plots
from reporting.report import report_page
from reporting.results import pairs, read_scores, read_trainings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provenance", type=json.loads, required=True, help="JSON: config slice, code, upstream")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="manifests of evaluations")
    parser.add_argument("--trainings", type=Path, nargs="*", default=[], help="manifests of trainings")
    parser.add_argument("--plots", type=Path, required=True, help="the manifest of the plots")
    parser.add_argument("--sources", type=Path, nargs="*", default=[], help="manifests to name the origins from")
    parser.add_argument("--html", type=Path, required=True, help="the page to write")
    arguments = parser.parse_args()
    scores, plots = read_scores(arguments.scores), read_manifest(arguments.plots).require()
    page = report_page(
        scores,
        pairs(scores),
        read_trainings(arguments.trainings),
        plots,
        [read_manifest(path) for path in arguments.sources],
        Plots.model_validate(plots.provenance["config"]["plots"]),
    )
    atomic_write(arguments.html, page)


if __name__ == "__main__":
    run(main)
