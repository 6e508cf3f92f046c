"""What Megatron-Core hard-codes to CUDA, answered for a machine without it. `install` is called once, by `initialize`.

Nothing here runs where CUDA is available, and nothing outside this file knows of these places.
"""

import torch
from megatron.core.ssm.gated_delta_net import common as gated_delta_net
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


def install() -> None:
    """Let Megatron-Core build and run its modules on the CPU."""
    # Buffers are allocated on "the current device".
    torch.cuda.current_device = lambda: torch.device("cpu")
    # GatedDeltaNet refuses to be built without fla's CUDA kernels; ours brings its own (kernels.py).
    gated_delta_net.HAVE_FLA = True
    # Recomputation restores CUDA's random state; there is none, and nothing here draws from it (no dropout).
    random._get_cuda_rng_state = lambda *args, **kwargs: None
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    random.initialize_rng_tracker(inference_rng_tracker=True)  # the tracker whose fork() does nothing
    # The all-to-all dispatcher copies its counts to the host on a CUDA stream of its own.
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _counts_on_host


def _counts_on_host(dispatcher: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: torch.Tensor = None):
    """Turn the split sizes into lists, as `all_to_all_single` wants them; the other counts stay tensors."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits"):
            splits = getattr(dispatcher, name)
            if torch.is_tensor(splits):
                setattr(dispatcher, name, splits.tolist())
    return tokens_per_expert
