"""Write the tables of scores and of paired differences: as CSV, Markdown and HTML."""

from pathlib import Path

from milepost.common.errors import run
from milepost.common.files import atomic_write
from milepost.common.jobs import job_parser
from milepost.configuration.schema import Plots
from milepost.reporting.report import tables_page
from milepost.reporting.results import pairs, read_scores
from milepost.reporting.tables import difference_table, markdown, score_table, titled


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="manifests of evaluations")
    parser.add_argument("--csv", type=Path, required=True, help="table of scores to write")
    parser.add_argument("--differences", type=Path, required=True, help="table of paired differences to write, as CSV")
    parser.add_argument("--markdown", type=Path, required=True, help="both tables to write, as Markdown")
    parser.add_argument("--html", type=Path, required=True, help="both tables to write, as HTML")
    arguments = parser.parse_args()
    scores = read_scores(arguments.scores)
    readable = titled(scores, pairs(scores))
    atomic_write(arguments.csv, score_table(scores).to_csv(index=False))
    atomic_write(arguments.differences, difference_table(pairs(scores)).to_csv(index=False))
    atomic_write(arguments.markdown, markdown(readable))
    atomic_write(arguments.html, tables_page(readable, Plots()))


if __name__ == "__main__":
    run(main)
