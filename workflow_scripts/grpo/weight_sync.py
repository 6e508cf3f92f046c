"""The trainer's weights into the rollout engine, by their names on the Hub."""

from torch import nn

from checkpoints.mapping import to_hub
from checkpoints.safetensors_io import HubCheckpoint
from qwen3_5.architecture import Architecture
from rollout.engine import RolloutEngine


def push_weights(
    model: nn.Module, architecture: Architecture, hub: HubCheckpoint, engine: RolloutEngine | None
) -> None:
    """Send every text weight to ``engine``, one tensor at a time.

    Every rank calls this, since a tensor's shards meet on the way; the one that drives the engine hands it over.
    """
    named = to_hub(model, architecture, hub)
    if engine is not None:
        engine.load_weights(named)
    for _ in named:  # the others' part, and whatever an engine left
        pass
