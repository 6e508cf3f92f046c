"""Write the tables of scores and of paired differences, as CSV and as Markdown, and print what they say in words."""

import sys
from pathlib import Path

from milepost.common.errors import run
from milepost.common.files import atomic_write
from milepost.common.jobs import job_parser
from milepost.reporting.results import pairs, read_scores, read_trainings
from milepost.reporting.tables import difference_table, markdown, score_table, sentences, titled


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="manifests of evaluations")
    parser.add_argument("--trainings", type=Path, nargs="*", default=[], help="manifests of trainings")
    parser.add_argument("--csv", type=Path, required=True, help="table of scores to write")
    parser.add_argument("--differences", type=Path, required=True, help="table of paired differences to write, as CSV")
    parser.add_argument("--markdown", type=Path, required=True, help="both tables to write, as Markdown")
    arguments = parser.parse_args()
    scores = read_scores(arguments.scores)
    compared = pairs(scores, arguments.job["config"].get("compare", ()))
    said = sentences(scores, compared, read_trainings(arguments.trainings))
    atomic_write(arguments.csv, score_table(scores).to_csv(index=False))
    atomic_write(arguments.differences, difference_table(compared).to_csv(index=False))
    atomic_write(arguments.markdown, markdown(titled(scores, compared), said))
    print(*said, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    run(main)
