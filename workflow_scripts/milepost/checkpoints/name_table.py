"""The table of names: which Hub tensors make up each Megatron tensor, and how tensor-parallel ranks split them.

One table serves both directions, and every parallel layout. `shards` turns a row into the blocks that one rank holds,
`mapping` copies those blocks.

Where Megatron-Core stores several Hub tensors as one, each component is split on its own: a rank's ``linear_fc1`` is
its shard of the gate projection followed by its shard of the up projection; its ``in_proj`` is its queries, keys,
values, z, b and a. ``linear_qkv`` holds whole KV groups: the group's query heads, their output gates, its key, its
value.
"""

from collections.abc import Iterable
from typing import NamedTuple

TEXT = "model.language_model."
VISION = "model.visual."
MTP = "mtp."
HEAD_NAME = "lm_head.weight"


def text_prefix(names: Iterable[str]) -> str:
    """What the names of the text model's tensors begin with, in a checkpoint that holds ``names``.

    A checkpoint of the text model alone, as `Qwen3_5ForCausalLM` saves it, has shorter names than one with vision.
    """
    return "model." if any(name.startswith(("model.layers.", "model.embed_tokens.")) for name in names) else TEXT


class Rule(NamedTuple):
    """How one Megatron tensor is made of Hub tensors.

    Attributes:
        megatron: the Megatron tensor's name within its layer.
        hub: Hub name -> its axes, as names of sizes (`shards._sizes`); ``a+b`` is one axis made of two components. A
            name with ``{expert}`` means one Hub tensor per expert.
        axis: the axis of the Hub tensor along which components are concatenated and tensor-parallel ranks split each;
            None if every rank holds the whole tensor.
        grouped: queries, gates, keys and values are interleaved by KV group.
    """

    megatron: str
    hub: dict[str, str]
    axis: int | None = None
    grouped: bool = False


OUTER = (
    Rule("embedding.word_embeddings.weight", {"embed_tokens.weight": "vocabulary hidden"}, 0),
    Rule("decoder.final_layernorm.weight", {"norm.weight": "hidden"}),
)
HEAD = (Rule("output_layer.weight", {HEAD_NAME: "vocabulary hidden"}, 0),)
MTP_OUTER = (
    Rule("enorm.weight", {"pre_fc_norm_embedding.weight": "hidden"}),
    Rule("hnorm.weight", {"pre_fc_norm_hidden.weight": "hidden"}),
    Rule("eh_proj.weight", {"fc.weight": "hidden hidden+hidden"}, 0),
    Rule("final_layernorm.weight", {"norm.weight": "hidden"}),
)
NORMS = (
    Rule("input_layernorm.weight", {"input_layernorm.weight": "hidden"}),
    Rule("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "hidden"}),
)
FULL_ATTENTION = (
    Rule(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": "query+query hidden",
            "self_attn.k_proj.weight": "key_value hidden",
            "self_attn.v_proj.weight": "key_value hidden",
        },
        axis=0,
        grouped=True,
    ),
    Rule("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "head"}),
    Rule("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "head"}),
    Rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden query"}, 1),
)
LINEAR_ATTENTION = (
    Rule(
        "self_attention.in_proj.weight",
        {
            "linear_attn.in_proj_qkv.weight": "linear_key+linear_key+linear_value hidden",
            "linear_attn.in_proj_z.weight": "linear_value hidden",
            "linear_attn.in_proj_b.weight": "linear_value_heads hidden",
            "linear_attn.in_proj_a.weight": "linear_value_heads hidden",
        },
        axis=0,
    ),
    Rule(
        "self_attention.conv1d.weight",
        {"linear_attn.conv1d.weight": "linear_key+linear_key+linear_value one kernel"},
        axis=0,
    ),
    Rule("self_attention.A_log", {"linear_attn.A_log": "linear_value_heads"}, 0),
    Rule("self_attention.dt_bias", {"linear_attn.dt_bias": "linear_value_heads"}, 0),
    Rule("self_attention.out_norm.weight", {"linear_attn.norm.weight": "linear_value_head"}),
    Rule("self_attention.out_proj.weight", {"linear_attn.out_proj.weight": "hidden linear_value"}, 1),
)
DENSE_MLP = (
    Rule("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"}, 0),
    Rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}, 1),
)
MOE_MLP = (
    Rule("mlp.router.weight", {"mlp.gate.weight": "experts hidden"}),
    Rule("mlp.shared_experts.gate_weight", {"mlp.shared_expert_gate.weight": "one hidden"}),
    Rule(
        "mlp.shared_experts.linear_fc1.weight",
        {
            "mlp.shared_expert.gate_proj.weight": "shared_ffn hidden",
            "mlp.shared_expert.up_proj.weight": "shared_ffn hidden",
        },
        axis=0,
    ),
    Rule("mlp.shared_experts.linear_fc2.weight", {"mlp.shared_expert.down_proj.weight": "hidden shared_ffn"}, 1),
)
FUSED_EXPERTS = (
    Rule("mlp.experts.linear_fc1.weight", {"mlp.experts.gate_up_proj": "experts expert_ffn+expert_ffn hidden"}, 1),
    Rule("mlp.experts.linear_fc2.weight", {"mlp.experts.down_proj": "experts hidden expert_ffn"}, 2),
)
SEPARATE_EXPERTS = (
    Rule(
        "mlp.experts.linear_fc1.weight",
        {
            "mlp.experts.{expert}.gate_proj.weight": "expert_ffn hidden",
            "mlp.experts.{expert}.up_proj.weight": "expert_ffn hidden",
        },
        axis=0,
    ),
    Rule("mlp.experts.linear_fc2.weight", {"mlp.experts.{expert}.down_proj.weight": "hidden expert_ffn"}, 1),
)
