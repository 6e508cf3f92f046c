"""Make a tiny Qwen3.5, warmed up on sums, instead of downloading a model: a Hub-format folder and its manifest."""

import argparse
import hashlib
import json
from pathlib import Path

import torch
import transformers

from milepost.checkpoints.folders import finish_folder, partial_folder, start_folder
from milepost.checkpoints.manifest import describe, write_manifest
from milepost.common.errors import run
from milepost.common.files import hold
from milepost.common.jobs import job_parser
from milepost.configuration.schema import ModelSource
from milepost.tiny.checkpoint import hub_tensors, model_config, random_model, write_checkpoint
from milepost.tiny.tokenizer import train_tokenizer
from milepost.tiny.warm_up import warm_up


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--name", required=True, help="name of the model")
    parser.add_argument("--folder", type=Path, required=True, help="where to create the folder of the files")
    parser.add_argument("--manifest", type=Path, required=True, help="the manifest to write, last")
    arguments = parser.parse_args()
    with hold(arguments.manifest):
        make(arguments)


def make(arguments: argparse.Namespace) -> None:
    tiny = ModelSource.model_validate(arguments.job["config"]["source"]).tiny
    transformers.logging.set_verbosity_error()  # it recommends GPU kernels

    torch.set_num_threads(
        1
    )  # its products are too small for threads; with one, the weights don't depend on the core count

    tokenizer = train_tokenizer()
    config = model_config(tiny, tokenizer)
    model = random_model(tiny, config)
    warm_up(model, tokenizer, tiny)

    partial = partial_folder(arguments.folder / arguments.name)
    start_folder(partial)
    write_checkpoint(partial, config, hub_tensors(tiny, model), tokenizer)
    files = {file.name: describe(file) for file in sorted(partial.iterdir())}
    commit = hashlib.sha256(json.dumps([tiny.model_dump(mode="json"), files]).encode()).hexdigest()[:12]
    folder = arguments.folder / f"{arguments.name}@{commit}"
    finish_folder(partial, folder)
    write_manifest(
        arguments.manifest,
        "download",
        folder,
        files,
        arguments.job,
        {"repo": None, "revision": None, "commit": commit, "tiny": tiny.model_dump(mode="json")},
    )


if __name__ == "__main__":
    run(main)
