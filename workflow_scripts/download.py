"""Fetch a model or a data set, from the Hub at one commit or from a local folder, and check and record its files."""

import argparse
import sys
from pathlib import Path
from typing import Any

from milepost.checkpoints.inspection import Inspection
from milepost.checkpoints.manifest import write_manifest
from milepost.common.errors import run
from milepost.common.files import hold
from milepost.common.jobs import job_parser
from milepost.common.labels import READERS
from milepost.configuration.schema import Architecture, Dataset, ModelSource, Section
from milepost.hub import environment
from milepost.problems.loading import Problem, kinds_of, load_problem_set, says_how_to_answer, source_of


class ModelSettings(Section):
    """The settings that a model's download depends on."""

    source: ModelSource
    architecture: Architecture | None = None


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--name", required=True, help="name for the files of a local folder")
    parser.add_argument("--folder", type=Path, required=True, help="where to create the folder of the files")
    parser.add_argument("--manifest", type=Path, required=True, help="the manifest to write, last")
    arguments = parser.parse_args()
    with hold(arguments.manifest):
        download(arguments)


def download(arguments: argparse.Namespace) -> None:
    environment.require_importable()
    # Here, since huggingface_hub reads the environment when it is imported.
    from milepost.hub.snapshot import dataset_from_folder, dataset_from_hub, model_from_folder, model_from_hub

    settings = arguments.job["config"]
    if "dataset" in settings:
        dataset = Dataset.model_validate(settings["dataset"])
        fetch = dataset_from_folder if dataset.folder else dataset_from_hub
        snapshot = fetch(arguments.name, dataset, arguments.folder)
        # Errors name the user's own files, not the copies.
        root = Path(dataset.folder).expanduser() if dataset.folder else snapshot.root
        facts = {"rows": check_rows(arguments.name, dataset, arguments.job, root, sorted(snapshot.files))}
    else:
        model = ModelSettings.model_validate(settings)
        source, inspection = model.source, Inspection(model.architecture, arguments.job["mtp"])
        if source.folder:
            snapshot = model_from_folder(Path(source.folder), arguments.name, arguments.folder, inspection)
        else:
            snapshot = model_from_hub(source.repo, source.revision, arguments.folder, inspection)
        facts = {}

    write_manifest(
        arguments.manifest,
        "download",
        snapshot.root,
        snapshot.files,
        arguments.job,
        snapshot.facts | facts,
    )


def check_rows(name: str, dataset: Dataset, job: dict[str, Any], root: Path, files: list[str]) -> int:
    """Read a problem set, say what is noteworthy about its rows, and return how many are usable."""
    share = 0.0 if job["every_row"] else dataset.max_bad_share
    found = load_problem_set(root, files, dataset, job["labels"], max_bad_share=share, instructed=False)
    if dataset.filter or dataset.row_slice != (0, None):
        print(f"{name}: uses {len(found.problems)} of the {found.read} rows that were read", file=sys.stderr)
    for kind in kinds_of(found.bad):
        print(f"warning: {source_of(root, files)}: skipped: {kind}", file=sys.stderr)
    own = sum(problem.messages[0] != {"role": "system", "content": dataset.system} for problem in found.problems)
    if dataset.system and own:
        print(f"{name}: {own} of {len(found.problems)} prompts keep a system message of their own", file=sys.stderr)
    if asks := READERS[job["labels"]].asks:
        print(boxes(name, found.problems, dataset.instruction, asks), file=sys.stderr)
    return len(found.problems)


def boxes(name: str, problems: list[Problem], instruction: str | None, asks: tuple[str, ...]) -> str:
    r"""One line: how many prompts in the file ask for no answer in ``\boxed`` or the like, and what is done."""
    without, marks = sum(not says_how_to_answer(problem, asks) for problem in problems), " or ".join(asks)
    if not without:
        return f"{name}: all {len(problems)} prompts ask for a {marks} answer"
    found = f"{name}: {without} of {len(problems)} prompts ask for no {marks} answer, and the reward reads no other"
    if instruction and any(mark in instruction for mark in asks):
        return f"{found}: the data set's instruction, which asks for one, is added to them"
    fault = "its instruction does not either" if instruction else "it has no instruction"
    return (
        f"warning: {found}: {fault}; set datasets: {{{name}: {{instruction: ...}}}} to a sentence that asks for {marks}"
    )


if __name__ == "__main__":
    run(main)
