"""Generate a problem set of sums instead of downloading one: a JSON-lines file and its manifest."""

import json
from pathlib import Path

from milepost.checkpoints.manifest import write_manifest
from milepost.common.errors import run
from milepost.common.files import atomic_write
from milepost.common.jobs import job_parser
from milepost.configuration.schema import Dataset
from milepost.tiny.problems import draw


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--name", required=True, help="name of the problem set")
    parser.add_argument("--folder", type=Path, required=True, help="where to create the folder of the file")
    parser.add_argument("--manifest", type=Path, required=True, help="the manifest to write, last")
    arguments = parser.parse_args()
    dataset = Dataset.model_validate(arguments.job["config"]["dataset"])
    folder = arguments.folder / arguments.name

    rows = [addition.row(dataset.prompt_key, dataset.label_key) for addition in draw(dataset.problems)]
    atomic_write(folder / dataset.file, "".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(arguments.manifest, "download", folder, [dataset.file], arguments.job, {"rows": len(rows)})


if __name__ == "__main__":
    run(main)
