"""Qwen3.5's norms as modules that Megatron-Core's layer specs expect."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm, x / rms(x) * weight, in fp32 inside and the input's dtype outside; (..., H) to (..., H).

    ``over_heads``: the input is one head's vector. Under tensor parallelism a rank then sees only its own heads, so
    its gradient of the weight is a part of the whole, as it is for any norm under sequence parallelism.
    """

    offset = 0.0

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, *, over_heads: bool = False, **_: object
    ) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.full((hidden_size,), 1.0 - self.offset, dtype=config.params_dtype, device=device)
        )
        # Megatron-Core's own name for "sum this gradient over the tensor-parallel ranks".
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1 and (
            over_heads or config.sequence_parallel
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + self.offset
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.eps).to(x.dtype)


class ZeroCenteredRMSNorm(RMSNorm):
    """The norm of Qwen3.5's hidden states, queries and keys: its weight is stored less one."""

    offset = 1.0
