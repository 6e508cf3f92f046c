"""Bring a model or a data set here: from the Hub at one commit, or from a local folder; checked and recorded."""

import argparse
import json
from functools import partial
from pathlib import Path

from checkpoints.manifest import write_manifest
from common.errors import run
from common.files import hold
from common.problems import load_problem_set
from configuration.schema import Architecture, Dataset, ModelSource, Section
from configuration.shape import require_shape
from hub.snapshot import dataset_from_folder, dataset_from_hub, model_from_folder, model_from_hub


class ModelSettings(Section):
    """What a model's download reads of the configuration."""

    source: ModelSource
    architecture: Architecture | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--provenance", type=json.loads, required=True, help="JSON: config slice, code, upstream")
    parser.add_argument("--name", required=True, help="what a local folder's files are called here")
    parser.add_argument("--folder", type=Path, required=True, help="where to put the files, in a folder of their own")
    parser.add_argument("--manifest", type=Path, required=True, help="what to write")
    arguments = parser.parse_args()
    with hold(arguments.manifest):
        download(arguments)


def download(arguments: argparse.Namespace) -> None:
    settings = arguments.provenance["config"]

    if "dataset" in settings:
        dataset = Dataset.model_validate(settings["dataset"])
        if dataset.folder:
            snapshot = dataset_from_folder(Path(dataset.folder), dataset.file, arguments.name, arguments.folder)
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
        model = ModelSettings.model_validate(settings)
        source, shape = model.source, model.architecture
        inspect = partial(require_shape, shape=shape) if shape else None
        if source.folder:
            snapshot = model_from_folder(Path(source.folder), arguments.name, arguments.folder, inspect)
        else:
            snapshot = model_from_hub(source.repo, source.revision, arguments.folder, inspect)
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
