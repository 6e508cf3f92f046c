"""Fuse elementwise arithmetic into one kernel: torch compiles it for GPUs; on the CPU it runs eagerly.

Run operation by operation, memory-bound elementwise arithmetic takes half of a training step. A fused kernel reads its
input once, writes its result once and keeps fp32 intermediates in registers.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Norms of several widths, with and without gradients, share a function; past this limit it would run unfused.
_VARIANTS = 64


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of elementwise operations and reductions: on CUDA it runs in as few kernels as possible.

    The first dimension of positional tensors (rows) varies between calls; keyword arguments keep their shapes. The
    first call on CUDA compiles, which takes seconds unless the on-disk cache is warm.
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
    import torch._inductor.config  # slow to import, and useless without a GPU

    torch._dynamo.config.recompile_limit = _VARIANTS
    torch._inductor.config.compile_threads = 1  # else every training process starts one per core, for a kernel or two
    return torch.compile(function, dynamic=False)
