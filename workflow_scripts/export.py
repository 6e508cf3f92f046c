"""Export torch_dist weights, converted or trained, to the Hub's format, with the files of the download."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from milepost.checkpoints import mapping, torch_dist
from milepost.checkpoints.folders import finish_folder, partial_folder, start_folder
from milepost.checkpoints.manifest import (
    Manifest,
    keep_manifest,
    read_manifest,
    rewrite_manifest,
    same_result,
    write_manifest,
)
from milepost.checkpoints.safetensors_io import HubCheckpoint, HubWriter
from milepost.checkpoints.shards import untouched
from milepost.common.errors import UserError, run
from milepost.common.files import hold, require_room
from milepost.common.jobs import job_parser
from milepost.configuration.runs import checkpoint_name, require_same_start
from milepost.configuration.weights import BEST, LAST
from milepost.evaluation.selection import selection
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, finalize, initialize


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--hub", type=Path, required=True, help="manifest of the download that training started from")
    parser.add_argument("--weights", type=Path, required=True, help="manifest of a conversion or a training run")
    parser.add_argument("--checkpoint", default=LAST, help="of a training: last, best, or a number of rollouts")
    parser.add_argument("--folder", type=Path, required=True, help="where to write the checkpoint")
    parser.add_argument("--manifest", type=Path, required=True, help="its manifest, written last")
    arguments = parser.parse_args()
    with hold(arguments.manifest):
        export(arguments)


def export(arguments: argparse.Namespace) -> None:
    trained = read_manifest(arguments.weights)
    checkpoint = checkpoint_name(trained.root, trained.facts, arguments.checkpoint) if trained.kind == "train" else None
    if arguments.checkpoint == BEST and (chosen := selection(trained)):
        print(chosen, file=sys.stderr)
    same = same_result(arguments.folder, arguments.job)
    if same and same.facts.get("checkpoint", checkpoint) == checkpoint:
        print("the same weights and code as before: nothing to export", file=sys.stderr)
        rewrite_manifest(same, arguments.manifest, arguments.job)
        return
    source = read_manifest(arguments.hub).require(digests=True)
    require_same_start(arguments.weights, trained.provenance, arguments.job.get("inputs", {}).get("download"))
    weights = weights_folder(trained, checkpoint)

    architecture, hub = Architecture.from_folder(source.root), HubCheckpoint(source.root)
    initialize()
    mtp_num_layers = torch_dist.mtp_num_layers(weights)
    model = build_model(architecture, mtp_num_layers=mtp_num_layers, materialize=False).to_empty(device="cpu")
    mapping.take_dtypes(model, architecture, hub)
    torch_dist.load(model, weights)

    partial = partial_folder(arguments.folder)
    start_folder(partial)
    require_room(partial, sum(file["bytes"] for file in source.files.values()))
    with HubWriter(hub, partial) as writer, tqdm(total=len(hub.entries), unit=" tensors", mininterval=1) as bar:
        for name in untouched(hub, mtp_num_layers):
            writer.copy(name)
            bar.update()
        for name, tensor in mapping.to_hub(model, architecture, hub):
            mapping.refuse_non_finite(tensor, f"{weights}: {name}")
            writer.write(name, tensor)
            bar.update()
    finish_folder(partial, arguments.folder)
    made = write_manifest(
        arguments.manifest,
        "export",
        arguments.folder,
        writer.files(),
        arguments.job,
        source.facts | {"mtp_num_layers": mtp_num_layers, "checkpoint": checkpoint},
    )
    keep_manifest(made)
    finalize()


def weights_folder(manifest: Manifest, checkpoint: str | None) -> Path:
    """The folder of torch_dist weights, its files checked: of a conversion, or of a training's ``checkpoint``."""
    if manifest.kind == "convert":
        return manifest.require(digests=True).root
    if manifest.kind != "train":
        raise UserError(f"{manifest.path}: a manifest of {manifest.kind!r}: give one of a conversion or a training")
    folder = manifest.root / checkpoint / "weights"
    if folder == manifest.root / manifest.facts["weights"]:
        manifest.require(digests=True)
    else:  # the training's manifest lists the last checkpoint's files alone
        saved = read_manifest(folder.with_name("manifest.json"))
        weights = {name: entry for name, entry in saved.files.items() if name.startswith("weights/")}
        replace(saved, files=weights).require(digests=True)
    return folder


if __name__ == "__main__":
    run(main)
