"""Elementwise arithmetic as one kernel: torch compiles it for GPUs, and the CPU runs it as it stands.

Operation by operation, half of a training step goes to arithmetic that moves memory and hardly computes. In one kernel
a chain of it reads its input once and writes its result once, and what is fp32 in between never leaves the registers.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Norms of several widths, with and without gradients, share a function; past the limit it would run unfused.
_VARIANTS = 64


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` of elementwise operations and reductions, in as few kernels as can be where its tensors are on CUDA.

    Positional tensors have rows first, of which every call has another number; what is given by keyword keeps its shape
    from call to call. The first call on CUDA compiles (seconds; from the cache on disk where it is warm).
    """

    @functools.wraps(function)
    def call(*rows: Tensor | None, **constants: Any) -> Any:
        if not rows[0].is_cuda:
            return function(*rows, **constants)
        for tensor in rows:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return _compiled(function)(*rows, **constants)

    return call


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch._inductor.config  # slow, and of no use without a GPU

    torch._dynamo.config.recompile_limit = _VARIANTS
    torch._inductor.config.compile_threads = 1  # else every training process starts one a core, for a kernel or two
    return torch.compile(function, dynamic=False)
