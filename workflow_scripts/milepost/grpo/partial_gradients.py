"""Gradients that a tensor-parallel rank knows in part, as both optimizers complete them before they reduce."""

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn


def sum_partial_gradients(parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> None:
    """Complete the replicated weights whose gradient a tensor-parallel rank knows only in part.

    Those are the weights that see a part of the sequence (``sequence_parallel``) or a part of the heads (the norms of
    queries and keys, which Megatron-Core finds by name).
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for name, parameter in parameters.items():
        by_heads = "q_layernorm" in name or "k_layernorm" in name
        if getattr(parameter, "sequence_parallel", False) or by_heads:
            dist.all_reduce(gradients[name], group=group)
