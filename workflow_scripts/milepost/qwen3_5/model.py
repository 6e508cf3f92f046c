"""The model, and access to its final hidden states and output weight, from which losses compute logits in chunks.

The logits of one 9,216-token pack over a vocabulary of 248,320 would take 9 GB in fp32.
"""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from milepost.qwen3_5.packed import Packed


class Qwen3_5(GPTModel):
    """Megatron-Core's GPTModel, whose MTP layer runs only in `qwen3_5.mtp.mtp_loss`.

    ``model(input_ids (1, T), position_ids (1, T), None, packed_seq_params=packed)`` returns logits (1, T, V / tp), or,
    on an earlier pipeline stage, the activations (T / shards, 1, hidden) for the next stage.
    """

    def _postprocess(self, hidden_states: Tensor, *, output_processor: Any = None, **_: Any) -> Tensor:
        if not self.post_process or output_processor is not None:
            return hidden_states
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return logits.transpose(0, 1).contiguous()


def hidden_states(model: nn.Module, input_ids: Tensor, position_ids: Tensor, packed: Packed) -> Tensor:
    """Final hidden states, after the last norm: (T / cp, hidden), complete on every tensor-parallel rank.

    Their gradient must be complete too: a vocabulary-parallel loss all-reduces it first. A pipeline stage before the
    last returns the activations (T / shards, 1, hidden) for the next stage.

    Args:
        model: as `build_model` returns it, or wrapped.
        input_ids, position_ids: (1, T / cp), this context-parallel rank's run of tokens.
        packed: the whole pack's layout.
    """
    core = bare(model)
    hidden = model(input_ids, position_ids, None, packed_seq_params=packed, output_processor=True)
    if not core.post_process:
        return hidden
    if core.config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden[:, 0]


def output_weight(model: nn.Module) -> Tensor:
    """The weight that maps hidden states to logits, this rank's rows of the vocabulary: (V / tp, hidden)."""
    core = bare(model)
    tied = core.share_embeddings_and_output_weights
    return core.shared_embedding_or_output_weight() if tied else core.output_layer.weight


def bare(model: nn.Module) -> Qwen3_5:
    """The model inside a wrapper such as Megatron-Core's DistributedDataParallel."""
    while not isinstance(model, Qwen3_5):
        model = model.module
    return model
