"""Patches for places where Megatron-Core hard-codes CUDA, so that it runs on a CPU. `initialize` calls `install`.

Nothing here runs where CUDA is available, and no other file depends on these patches.
"""

import torch
from megatron.core.ssm.gated_delta_net import common as gated_delta_net
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


def install() -> None:
    """Let Megatron-Core build and run its modules on the CPU."""
    # Buffers are allocated on "the current device".
    torch.cuda.current_device = lambda: torch.device("cpu")
    # GatedDeltaNet refuses to be built without fla's CUDA kernels; kernels.py replaces them.
    gated_delta_net.HAVE_FLA = True
    # Recomputation restores CUDA's random state; there is none, and nothing here draws from it (no dropout).
    random._get_cuda_rng_state = lambda *args, **kwargs: None
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    random.initialize_rng_tracker(inference_rng_tracker=True)  # the tracker whose fork() does nothing
    # The all-to-all dispatcher copies its counts to the host on a CUDA stream of its own.
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _counts_on_host


def _counts_on_host(dispatcher: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: torch.Tensor = None):
    """Convert the split sizes to lists, as `all_to_all_single` needs them; the other counts stay tensors."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits"):
            splits = getattr(dispatcher, name)
            if torch.is_tensor(splits):
                setattr(dispatcher, name, splits.tolist())
    return tokens_per_expert
