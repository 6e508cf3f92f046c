"""Sum gradients that each tensor-parallel rank has only a part of; both optimizers do so before they reduce."""

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn


def sum_partial_gradients(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> None:
    """All-reduce the gradients of replicated weights that see only a part of the input on each tensor-parallel rank.

    That part is some of the sequence (``sequence_parallel``), or some of the heads (the norms of queries and keys,
    which Megatron-Core finds by name, too).
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for name, parameter in parameters.items():
        by_heads = "q_layernorm" in name or "k_layernorm" in name
        if getattr(parameter, "sequence_parallel", False) or by_heads:
            dist.all_reduce(gradients[name], group=group)
