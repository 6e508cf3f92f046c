"""Routing replay: train with the experts that the rollout engine chose.

Engine and trainer round differently, so where two experts score nearly the same they may choose different ones: a
different expert's output, not a rounding error. With replay, the trainer's router only weights the engine's choice, and
its gradient flows through those weights.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from milepost.qwen3_5.model import bare


class Replay:
    """Megatron-Core's hook into a router's top-k: replays a given choice, or lets the router choose.

    Attributes:
        experts: (tokens, k), the experts to visit in the next passes; None lets the router choose.
        agreement: [replayed choices that the router would have made too, replayed choices] since
            `take_routing_agreement`.
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
        if torch.is_grad_enabled():  # count once: under recomputation the first pass runs without gradients
            _, own = choose(scores, topk, num_groups=groups, group_topk=group_topk)
            same = (own[:, :, None] == self.experts[:, None]).any(-1)
            counts = torch.stack([same.sum(), torch.full_like(same.sum(), same.numel())])
            self.agreement = counts if self.agreement is None else self.agreement + counts
        return scores.gather(1, self.experts), self.experts


def replay_routing(model: nn.Module, routing: Tensor) -> None:
    """Make the decoder's routers use these experts from now on: (R / cp, layers, k), for this rank's rows.

    Under sequence parallelism each tensor-parallel rank takes its part of the rows.
    """
    replays = [layer.mlp.router.router_replay for layer in bare(model).decoder.layers]
    if model.config.sequence_parallel:
        size = parallel_state.get_tensor_model_parallel_world_size()
        routing = routing.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
    for layer, replay in enumerate(replays):
        replay.experts = routing[:, layer]


def take_routing_agreement(model: nn.Module) -> float | None:
    """The share of replayed choices that the routers would also have made since the last call, over all ranks.

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
