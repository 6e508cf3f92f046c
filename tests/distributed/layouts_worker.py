"""One of several processes: the weights of a checkpoint through one parallel layout after the other."""

import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from checkpoints import mapping, torch_dist
from checkpoints.safetensors_io import HubCheckpoint
from configuration.schema import Parallel
from qwen3_5.architecture import Architecture
from qwen3_5.build import build_model, finalize, initialize

DENSE = [Parallel(tensor=2), Parallel()]
MOE = [
    Parallel(expert=4),
    Parallel(tensor=2, expert=2, expert_tensor=2),
    Parallel(tensor=2, pipeline=2, expert=2),
    Parallel(pipeline=2),
]


def check(model: torch.nn.Module, architecture: Architecture, hub: HubCheckpoint, when: str) -> None:
    """On every rank, every text weight must be the checkpoint's, bit for bit."""
    returned = set()
    for name, value in mapping.to_hub(model, architecture, hub):
        expected = hub.read(name)
        assert value.dtype == expected.dtype and value.equal(expected), f"{when}: {name}"
        returned.add(name)
    assert returned == set(hub) - set(mapping.untouched(hub, mapping.mtp_num_layers_of(model))), when


def main(folder: Path, work: Path) -> None:
    architecture, hub = Architecture.from_folder(folder), HubCheckpoint(folder)
    saved = None
    for number, parallel in enumerate(MOE if architecture.is_moe else DENSE):
        initialize(parallel)
        model = build_model(architecture, parallel, mtp_num_layers=int(parallel.pipeline == 1))
        if saved is None:
            mapping.from_hub(model, architecture, hub)
            check(model, architecture, hub, f"read from the Hub's format into {parallel}")
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            torch_dist.load(model, saved)
            check(model, architecture, hub, f"saved by the layout before, loaded into {parallel}")
            mapping.from_hub(model, architecture, hub)
            check(model, architecture, hub, f"read from the Hub's format into {parallel}")
        saved = work / f"weights-{number}"
        torch_dist.save(model, saved)
        parallel_state.destroy_model_parallel()
    finalize()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
