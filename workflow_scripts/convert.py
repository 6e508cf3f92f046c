"""Convert a model from the Hub's format to Megatron-Core's torch_dist, in one process or several under torchrun."""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from milepost.checkpoints import mapping, torch_dist
from milepost.checkpoints.manifest import keep_manifest, read_manifest, rewrite_manifest, same_result, write_manifest
from milepost.checkpoints.name_table import text_prefix
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError, run
from milepost.common.files import hold
from milepost.common.jobs import job_parser
from milepost.configuration.layout import conversion_fault
from milepost.configuration.schema import Parallel
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, finalize, initialize


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--hub", type=Path, required=True, help="the download's manifest")
    parser.add_argument("--mtp-num-layers", type=int, required=True, help="MTP layers to convert")
    parser.add_argument("--folder", type=Path, required=True, help="where to write the torch_dist checkpoint")
    parser.add_argument("--manifest", type=Path, required=True, help="its manifest, written last")
    arguments = parser.parse_args()
    with hold(arguments.manifest) if int(os.environ.get("RANK", 0)) == 0 else nullcontext():
        convert(arguments)


def convert(arguments: argparse.Namespace) -> None:
    first = int(os.environ.get("RANK", 0)) == 0
    if same := same_result(arguments.folder, arguments.job):
        if first:
            print("the same weights, settings and code as before: nothing to convert", file=sys.stderr)
            rewrite_manifest(same, arguments.manifest, arguments.job)
        return
    source = read_manifest(arguments.hub).require(digests=first)
    architecture, hub = Architecture.from_folder(source.root), HubCheckpoint(source.root)
    parallel = layout(architecture, processes=int(os.environ.get("WORLD_SIZE", 1)))
    initialize(parallel)
    # Always on the CPU, where memory is only used as tensors are filled.
    model = build_model(architecture, parallel, mtp_num_layers=arguments.mtp_num_layers, materialize=False)
    model.to_empty(device="cpu")
    mapping.take_dtypes(model, architecture, hub)

    share = sum(parameter.nbytes for parameter in model.parameters())
    with progress("read", share) as bar:
        mapping.from_hub(model, architecture, hub, bar.update)
    with progress("write", share) as bar:
        torch_dist.save(model, arguments.folder, bar.update)

    if dist.get_rank() == 0:
        made = write_manifest(
            arguments.manifest,
            "convert",
            arguments.folder,
            [file.name for file in arguments.folder.iterdir()],
            arguments.job,
            {
                "mtp_num_layers": arguments.mtp_num_layers,
                "dtype": str(hub.dtype(text_prefix(hub) + "embed_tokens.weight")).removeprefix("torch."),
                "processes": dist.get_world_size(),
                "parallel": parallel.model_dump(mode="json"),
            },
        )
        keep_manifest(made)
    finalize()


def layout(architecture: Architecture, processes: int) -> Parallel:
    """The parallel layout: processes split the experts or, in a dense model, every matrix."""
    if fault := conversion_fault(architecture, processes):
        raise UserError(f"conversion.processes: {fault}")
    return Parallel(expert=processes) if architecture.is_moe else Parallel(tensor=processes)


def progress(what: str, share: int) -> tqdm:
    """A progress bar over the bytes of this process's shards, shown only on rank 0."""
    shown = dist.get_rank() == 0
    return tqdm(desc=what, total=share, unit="B", unit_scale=True, mininterval=1, disable=not shown)


if __name__ == "__main__":
    run(main)
