"""Bring a model or a data set here: from the Hub at one commit, or from a local folder; checked, linked, recorded."""

import argparse
import json
from pathlib import Path

from checkpoints.manifest import write_manifest
from common.errors import run
from common.files import hold
from common.problems import load_problem_set
from configuration.schema import Dataset, ModelSource
from hub.snapshot import MODEL_FILES, dataset_from_hub, from_folder, model_from_hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provenance", type=json.loads, required=True, help="JSON: config slice, code, upstream")
    parser.add_argument("--name", required=True, help="what a local folder's files are called here")
    parser.add_argument("--folder", type=Path, required=True, help="where to link the files, in a folder of their own")
    parser.add_argument("--manifest", type=Path, required=True, help="what to write")
    arguments = parser.parse_args()
    with hold(arguments.manifest):
        download(arguments)


def download(arguments: argparse.Namespace) -> None:
    settings = arguments.provenance["config"]

    if "dataset" in settings:
        dataset = Dataset.model_validate(settings["dataset"])
        if dataset.folder:
            snapshot = from_folder(Path(dataset.folder), [dataset.file], arguments.name, arguments.folder)
        else:
            snapshot = dataset_from_hub(dataset.repo, dataset.revision, dataset.file, arguments.folder)
        path = snapshot.root / dataset.file
        problems, _ = load_problem_set(path, dataset)
        facts = {
            "file": dataset.file,
            "rows": len(problems),
            "prompt_key": dataset.prompt_key,
            "label_key": dataset.label_key,
        }
    else:
        source = ModelSource.model_validate(settings["source"])
        if source.folder:
            snapshot = from_folder(Path(source.folder), MODEL_FILES, arguments.name, arguments.folder)
        else:
            snapshot = model_from_hub(source.repo, source.revision, arguments.folder)
        facts = {}

    write_manifest(
        arguments.manifest,
        "download",
        snapshot.root,
        snapshot.files,
        arguments.provenance,
        snapshot.facts | facts,
    )


if __name__ == "__main__":
    run(main)
