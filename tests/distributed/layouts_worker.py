"""One of four processes: pass each checkpoint's weights through several parallel layouts."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from milepost.checkpoints import mapping, torch_dist
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.checkpoints.shards import untouched
from milepost.configuration.schema import Parallel
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, initialize

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
    assert returned == set(hub) - set(untouched(hub, mapping.mtp_num_layers_of(model))), when


def through_every_layout(folder: Path) -> None:
    """Save under each layout and load under the next; also load from the Hub's format under each."""
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
        saved = folder.parent / f"{folder.name}-{number}"
        torch_dist.save(model, saved)
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        through_every_layout(Path(name))
    dist.destroy_process_group()
