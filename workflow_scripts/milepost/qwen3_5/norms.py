"""Qwen3.5's norms, with the constructor that Megatron-Core's layer specs expect."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from milepost.qwen3_5.fusion import fused


class RMSNorm(nn.Module):
    """Root-mean-square norm, x / rms(x) * weight, computed in fp32, returned in x's dtype: (..., H) -> (..., H).

    ``over_heads``: the input is one head's vector. Under tensor parallelism a rank then sees only its own heads, so its
    weight gradient is a partial sum, as for any norm under sequence parallelism.
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
        # Megatron-Core's flag for "sum this gradient over the tensor-parallel ranks".
        self.weight.sequence_parallel = config.tensor_model_parallel_size > 1 and (
            over_heads or config.sequence_parallel
        )

    def forward(self, x: Tensor) -> Tensor:
        return _norm(x, weight=self.weight, offset=self.offset, eps=self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """The norm of Qwen3.5's hidden states, queries and keys: it scales by 1 + weight."""

    offset = 1.0


class GatedRMSNorm(RMSNorm):
    """The norm of Gated DeltaNet's heads: x / rms(x) * weight * silu(gate), gate (..., H) like x."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return _gated_norm(x, gate, weight=self.weight, eps=self.eps)


@fused
def _norm(x: Tensor, *, weight: Tensor, offset: float, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)


@fused
def _gated_norm(x: Tensor, gate: Tensor, *, weight: Tensor, eps: float) -> Tensor:
    normed = F.rms_norm(x.float(), weight.shape, weight.float(), eps)
    return (normed * F.silu(gate.float())).to(x.dtype)
