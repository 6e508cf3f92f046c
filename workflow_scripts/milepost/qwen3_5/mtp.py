"""Multi-token prediction: Qwen3.5's layer that predicts token t + 2 from t's hidden state and token t + 1.

Trunk, embedding and output weight are detached, so the loss trains only the layer's own parameters. (Megatron-Core's
MTP loss reaches the trunk if no labels are passed, as in RL.)
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from milepost.qwen3_5.model import Qwen3_5, bare, output_weight
from milepost.qwen3_5.packed import Packed, context_shard, shift_left


class MtpLayer(MultiTokenPredictionLayer):
    """Megatron-Core's layer, taking the next tokens' embeddings instead of shifting ids sequence by sequence."""

    def forward(self, hidden_states: Tensor, embeddings: Tensor, **context: Any) -> Tensor:
        """Hidden states and next-token embeddings, both (T / shards, 1, hidden) -> hidden states of the same shape."""
        if self.config.recompute_granularity == "full" and self.training:
            return self._checkpointed_forward(hidden_states=hidden_states, decoder_input=embeddings, **context)
        return self._proj_and_transformer_layer(hidden_states=hidden_states, decoder_input=embeddings, **context)


def mtp_targets(input_ids: Tensor, response_mask: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """The label of each position and whether it counts: both (1, T), for the whole pack.

    Position t sees tokens up to t + 1 and predicts t + 2. It counts if t + 2 is a response token of the same sequence,
    so the mask is shifted by two, like the labels.
    """
    return shift_left(input_ids, packed, 2), shift_left(response_mask, packed, 2).bool()


def mtp_loss(
    model: torch.nn.Module,
    hidden: Tensor,
    input_ids: Tensor,
    response_mask: Tensor,
    packed: Packed,
    *,
    token_count: Tensor | int | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Cross-entropy of the MTP layer over response tokens, with gradients only for its own parameters.

    Args:
        model: the last pipeline stage, built with an MTP layer.
        hidden: (T / cp, hidden), from `hidden_states` for this pack.
        input_ids, response_mask: (1, T) of the whole pack, also under context parallelism.
        token_count: divisor of the sum; by default the counted tokens of this pack, which gives the mean.
        chunk: positions whose logits are in memory at once.

    Returns:
        A scalar, 0 if no token counts. Under context parallelism each rank returns its own tokens' part of the sum.
    """
    core = bare(model)
    labels, mask = mtp_targets(input_ids, response_mask, packed)
    if token_count is None:
        token_count = mask.sum()
    predicted = _mtp_hidden_states(core, hidden.detach(), input_ids, packed)  # (T / cp, hidden)
    losses = _cross_entropy(predicted, output_weight(model).detach(), context_shard(labels)[0], chunk)
    counted = context_shard(mask)[0]
    return losses.masked_fill(~counted, 0).sum() / torch.as_tensor(token_count, device=losses.device).clamp(min=1)


def _mtp_hidden_states(core: Qwen3_5, hidden: Tensor, input_ids: Tensor, packed: Packed) -> Tensor:
    next_ids = context_shard(shift_left(input_ids, packed))
    hidden = hidden[:, None]  # (T / cp, 1, hidden)
    if core.config.sequence_parallel:
        hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden)
    with torch.no_grad():
        embeddings = core.embedding(input_ids=next_ids, position_ids=None)
    predicted = core.mtp.layers[0](
        # Recomputation computes parameter gradients only if some input requires one.
        hidden_states=hidden.requires_grad_(),
        embeddings=embeddings,
        rotary_pos_emb=core.rotary_pos_emb(packed.max_seqlen_q, packed_seq=True),
        packed_seq_params=packed,
    )
    if core.config.sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(predicted)[:, 0]
    return tensor_parallel.copy_to_tensor_model_parallel_region(predicted)[:, 0]


def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Hidden (T, hidden), this rank's output weight (V / tp, hidden), labels (T,) -> losses (T,) in fp32."""

    def of_chunk(rows: Tensor, targets: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy((rows @ weight.T).float()[:, None], targets[:, None])[:, 0]

    pairs = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat([checkpoint(of_chunk, rows, targets, use_reentrant=False) for rows, targets in pairs])
