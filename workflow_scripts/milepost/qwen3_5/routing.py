"""Replaying a choice of experts, so that training computes what the rollout engine computed.

Engine and trainer round differently, and where two experts score nearly alike the one may choose the first and the
other the second: another expert's output, not a rounding error. Told the engine's choice, the trainer's router only
weighs the experts chosen, and its gradient goes through those weights.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from milepost.qwen3_5.model import bare


class Replay:
    """What Megatron-Core's router asks which experts a token visits: it may be told, or chooses as it would.

    Attributes:
        experts: (tokens, k) those to visit in the next passes; None leaves the choice to the router.
        agreement: [choices that the router would have made as well, choices] since `take_routing_agreement`.
    """

    def __init__(self) -> None:
        self.experts: Tensor | None = None
        self.agreement: Tensor | None = None

    def get_replay_topk(
        self, scores: Tensor, topk: int, groups: int | None, group_topk: int | None, choose: Callable
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices (tokens, k) of the experts to visit."""
        if self.experts is None:
            return choose(scores, topk, num_groups=groups, group_topk=group_topk)
        if torch.is_grad_enabled():  # what trains, once
            _, own = choose(scores, topk, num_groups=groups, group_topk=group_topk)
            same = (own[:, :, None] == self.experts[:, None]).any(-1)
            counts = torch.stack([same.sum(), torch.full_like(same.sum(), same.numel())])
            self.agreement = counts if self.agreement is None else self.agreement + counts
        return scores.gather(1, self.experts), self.experts


def replay_routing(model: nn.Module, routing: Tensor) -> None:
    """Let the decoder's routers choose these experts from now on: (R / cp, layers, k), of this rank's rows.

    Under sequence parallelism each tensor-parallel rank takes its run of them.
    """
    replays = [layer.mlp.router.router_replay for layer in bare(model).decoder.layers]
    if model.config.sequence_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        routing = routing.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
    for layer, replay in enumerate(replays):
        replay.experts = routing[:, layer]


def take_routing_agreement(model: nn.Module) -> float | None:
    """The share of replayed choices that the routers would have made too, over all ranks, since the last call.

    None if nothing was replayed.
    """
    replays = [module.router_replay for module in model.modules() if hasattr(module, "router_replay")]
    counts = [replay.agreement for replay in replays if replay.agreement is not None]
    if not counts:
        return None
    total = torch.stack(counts).sum(0)
    dist.all_reduce(total)
    for replay in replays:
        replay.agreement = None
    return (total[0] / total[1]).item()
