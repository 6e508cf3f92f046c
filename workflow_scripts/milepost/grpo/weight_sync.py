"""Send the trainer's weights to the rollout engine, under their names on the Hub."""

from torch import nn

from milepost.checkpoints.mapping import to_hub
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.configuration.schema import Engine
from milepost.qwen3_5.architecture import Architecture
from milepost.rollout.engine import RolloutEngine, share_weights


def push_weights(
    model: nn.Module, architecture: Architecture, hub: HubCheckpoint, engine: RolloutEngine | None, settings: Engine
) -> None:
    """Send every text weight to ``engine``, one tensor at a time.

    Every rank calls this, since tensors are gathered from their shards; only rank 0 passes an ``engine``.
    """

    def send() -> None:
        named = to_hub(model, architecture, hub)
        if engine is None:
            share_weights(hub.folder, settings, named)
        else:
            engine.load_weights(named)

    send()
    if settings.check_weights:
        send() if engine is None else engine.check_weights(send)
