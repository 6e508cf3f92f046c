"""Mixture of experts: Megatron-Core's router, shared expert and dispatchers, with grouped routed experts."""

from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from torch import Tensor, nn

from milepost.qwen3_5 import kernels
from milepost.qwen3_5.dispatchers import AllGatherDispatcher, FlexDispatcher
from milepost.qwen3_5.routing import Replay

OWN_DISPATCHERS = {"allgather": AllGatherDispatcher, "flex": FlexDispatcher}


class MoELayer(MegatronMoELayer):
    """Megatron-Core's layer with the dispatchers in `OWN_DISPATCHERS` and a router whose choice can be replayed."""

    def __init__(self, *args: Any, dispatcher: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router.router_replay = Replay()
        if dispatcher in OWN_DISPATCHERS:
            self.token_dispatcher = OWN_DISPATCHERS[dispatcher](
                self.num_local_experts,
                self.local_expert_indices,
                config=self.config,
                pg_collection=kwargs["pg_collection"],
            )


class Experts(MegatronModule):
    """This rank's routed experts with stacked weights, computed by one grouped matrix product.

    The parameters are ``linear_fc1.weight`` (E, 2 F, hidden), each expert's gate rows before its up rows, and
    ``linear_fc2.weight`` (E, hidden, F), for E experts on this rank and F their width divided by the expert-tensor
    ranks. Distributed checkpoints use the names and shapes of Megatron-Core's experts.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.groups = pg_collection
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.linear_fc1 = StackedWeight(config, num_local_experts, 2 * width, config.hidden_size, partition_dim=1)
        self.linear_fc2 = StackedWeight(config, num_local_experts, config.hidden_size, width, partition_dim=2)
        self.load: Tensor | None = None  # (E,) tokens since `take_expert_load`

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probabilities: Tensor) -> tuple[Tensor, None]:
        """Tokens sorted by expert (N, hidden) -> their outputs (N, hidden), scaled by ``probabilities`` (N,)."""
        if torch.is_grad_enabled():  # count once: under recomputation the first pass runs without gradients
            visits = tokens_per_expert.detach().long()
            self.load = visits.clone() if self.load is None else self.load + visits
        product = grouped_product(tokens_per_expert, tokens.device)
        activated = kernels.swiglu(product(tokens, self.linear_fc1.weight), probabilities)  # (N, F)
        return product(activated, self.linear_fc2.weight), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The shards under Megatron-Core's keys for experts, ``experts.linear_fc1.weight`` within this module."""
        build = partial(_shard_of_experts, groups=self.groups, offsets=sharded_offsets)
        replica = (0, 0, self.groups.expt_dp.rank())
        keys = {name: f"{prefix}experts.{name}.weight" for name in ("linear_fc1", "linear_fc2")}
        fc1, fc2 = self.linear_fc1.weight, self.linear_fc2.weight
        return {
            # Gate and up rows are split over the expert-tensor ranks separately.
            f"{prefix}linear_fc1.weight": ShardedTensorFactory(
                keys["linear_fc1"], fc1, partial(_gate_and_up, build), partial(torch.cat, dim=1), replica
            ),
            f"{prefix}linear_fc2.weight": build(keys["linear_fc2"], fc2, replica, axis=2),
        }


class StackedWeight(nn.Module):
    """One matrix per expert, in one parameter (experts, rows, columns)."""

    def __init__(self, config: TransformerConfig, experts: int, rows: int, columns: int, partition_dim: int) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(experts, rows, columns, dtype=config.params_dtype, device=device))
        self.weight.allreduce = False  # its gradient is summed over the ranks that hold the same experts
        set_tensor_model_parallel_attributes(self.weight, True, partition_dim, 1)


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter belongs to routed experts, which differ between data-parallel ranks."""
    return not getattr(parameter, "allreduce", True)


def take_expert_load(model: nn.Module) -> Tensor | None:
    """How many tokens visited each expert in training since the last call, over all ranks: (layers, experts).

    None for a dense model. Layers that have not run since are left out.
    """
    here = [module for module in model.modules() if isinstance(module, Experts) and module.load is not None]
    if not here:
        return None
    groups, local = here[0].groups, here[0].num_local_experts
    load = torch.zeros(len(here), groups.ep.size() * local, dtype=torch.long, device=here[0].linear_fc1.weight.device)
    for row, experts in zip(load, here, strict=True):
        row[groups.ep.rank() * local :][:local] = experts.load.to(row.device)
        experts.load = None
    # Ranks that hold shards of one expert count the same tokens.
    dist.all_reduce(load)
    return load // groups.expt_tp.size()


def grouped_product(tokens_per_expert: Tensor, device: torch.device):
    """Return a function: tokens (N, K) sorted by expert, weight (E, M, K) -> (N, M), each token by its expert."""
    if device.type == "cuda":
        ends = tokens_per_expert.to(device, non_blocking=True).cumsum(0, dtype=torch.int32)
        return lambda tokens, weight: F.grouped_mm(tokens, weight.transpose(1, 2), offs=ends)
    counts = tokens_per_expert.tolist()
    return lambda tokens, weight: torch.cat(
        [F.linear(part, matrix) for part, matrix in zip(tokens.split(counts), weight.unbind(), strict=True)]
    )


def _shard_of_experts(
    key: str,
    weight: Tensor,
    replica: ReplicaId,
    *,
    axis: Literal[1, 2],
    groups: ProcessGroupCollection,
    offsets: tuple,
    part: int = 0,
    parts: int = 1,
) -> ShardedTensor:
    """This rank's shard of a layer's experts; along ``axis`` its slice of part ``part`` of ``parts``."""
    before = len(offsets)
    return ShardedTensor.from_rank_offsets(
        key,
        weight,
        *offsets,
        (before, groups.ep.rank(), groups.ep.size()),
        (before + axis, part * groups.expt_tp.size() + groups.expt_tp.rank(), parts * groups.expt_tp.size()),
        replica_id=replica,
        prepend_axis_num=before,
    )


def _gate_and_up(
    build: Any, key: str, weight: Tensor, replica: ReplicaId, flattened_range: None
) -> list[ShardedTensor]:
    return [build(key, half, replica, axis=1, part=part, parts=2) for part, half in enumerate(weight.chunk(2, 1))]
