"""The shape of a Qwen3.5 text model, read from its checkpoint's ``config.json``.

Plain Python, so that preflight checks and memory estimates need not import torch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from milepost.common.errors import UserError
from milepost.common.files import read_json

LayerKind = Literal["full_attention", "linear_attention"]

_MODEL_TYPES = {"qwen3_5_text", "qwen3_5_moe_text"}


@dataclass(frozen=True)
class Architecture:
    """Every number that determines the text model's parameters and function; the vision tower is not included."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    max_sequence_length: int
    tie_embeddings: bool
    norm_epsilon: float
    rotary_base: float
    rotary_percent: float

    # Full attention, in every `full_attention_interval`-th layer.
    full_attention_interval: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int

    # Gated DeltaNet, in all other layers.
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int

    # A dense model has `ffn_hidden_size` and no experts; a mixture of experts has the other four.
    ffn_hidden_size: int | None
    num_experts: int | None
    experts_per_token: int | None
    expert_ffn_hidden_size: int | None
    shared_expert_ffn_hidden_size: int | None

    mtp_num_layers: int

    @classmethod
    def from_folder(cls, folder: Path | str) -> Self:
        """Read ``config.json`` of a checkpoint in the Hub's format; `UserError` if it is not a Qwen3.5."""
        path = Path(folder) / "config.json"
        return cls.from_config(read_json(path), where=str(path))

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> Self:
        """Read a parsed ``config.json``; in one of a text-only checkpoint the keys of ``text_config`` are at the top.

        A missing key takes Transformers' default; without one it is a `UserError`.
        """
        text = config.get("text_config", config)  # a text-only checkpoint has its fields at the top
        if not isinstance(text, dict) or text.get("model_type") not in _MODEL_TYPES:
            found = text.get("model_type") if isinstance(text, dict) else text
            raise UserError(f"{where}: not a Qwen3.5 text model (model_type {found!r}): choose a Qwen3.5 checkpoint")

        def number(key: str, default: float | None = None, kind: type = int, section: dict[str, Any] = text) -> Any:
            value = default if section.get(key) is None else section[key]
            if value is None:
                raise UserError(f"{where}: has no {key}: the file is incomplete: use the checkpoint's own")
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
                expected = "a whole number" if kind is int else "a number"
                raise UserError(f"{where}: {key} is {value!r}: set it to {expected} above 0")
            return value

        is_moe = text["model_type"] == "qwen3_5_moe_text"
        rope = text | _rope(text)
        architecture = cls(
            num_layers=number("num_hidden_layers"),
            hidden_size=number("hidden_size"),
            vocab_size=number("vocab_size"),
            max_sequence_length=number("max_position_embeddings"),
            tie_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            norm_epsilon=number("rms_norm_eps", 1e-6, float),
            rotary_base=number("rope_theta", None, float, rope),
            rotary_percent=number("partial_rotary_factor", 0.25, float, rope),
            full_attention_interval=_full_attention_interval(text, where) or number("full_attention_interval", 4),
            num_attention_heads=number("num_attention_heads"),
            num_query_groups=number("num_key_value_heads"),
            head_dim=number("head_dim"),
            linear_num_key_heads=number("linear_num_key_heads"),
            linear_num_value_heads=number("linear_num_value_heads"),
            linear_key_head_dim=number("linear_key_head_dim"),
            linear_value_head_dim=number("linear_value_head_dim"),
            linear_conv_kernel_dim=number("linear_conv_kernel_dim", 4),
            ffn_hidden_size=None if is_moe else number("intermediate_size"),
            num_experts=number("num_experts") if is_moe else None,
            experts_per_token=number("num_experts_per_tok") if is_moe else None,
            expert_ffn_hidden_size=number("moe_intermediate_size") if is_moe else None,
            shared_expert_ffn_hidden_size=number("shared_expert_intermediate_size") if is_moe else None,
            mtp_num_layers=number("mtp_num_hidden_layers") if text.get("mtp_num_hidden_layers") else 0,
        )
        architecture._check(text, where)
        return architecture

    def _check(self, text: dict[str, Any], where: str) -> None:
        """Raise a `UserError` for variants that this implementation would compute wrongly."""
        rope_type = _rope(text).get("rope_type") or _rope(text).get("type") or "default"
        faults = [
            message
            for wrong, message in [
                (
                    (text.get("layer_types") or list(self.layer_kinds)) != list(self.layer_kinds)
                    or text.get("full_attention_interval") not in (None, self.full_attention_interval),
                    f"layer_types is not full attention in every {text.get('full_attention_interval') or 'N'}-th of the"
                    f" {self.num_layers} layers and linear attention in all others",
                ),
                (rope_type not in ("default", "mrope"), f"rope_type {rope_type!r} is not default"),
                (text.get("hidden_act", "silu") != "silu", f"hidden_act {text.get('hidden_act')!r} is not silu"),
                (bool(text.get("attention_bias")), "attention_bias is set"),
                (text.get("attn_output_gate") is False, "attn_output_gate is off"),
                (
                    text.get("output_gate_type") not in (None, "silu", "swish"),  # of linear attention
                    f"output_gate_type {text.get('output_gate_type')!r} is not swish",
                ),
                (
                    self.num_attention_heads % self.num_query_groups != 0,
                    f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads"
                    f" {self.num_query_groups}",
                ),
                (
                    self.linear_num_value_heads % self.linear_num_key_heads != 0,
                    f"linear_num_value_heads {self.linear_num_value_heads} is no multiple of linear_num_key_heads"
                    f" {self.linear_num_key_heads}",
                ),
                (self.mtp_num_layers > 1, f"mtp_num_hidden_layers {self.mtp_num_layers} is more than 1"),
                (
                    self.is_moe and self.experts_per_token > self.num_experts,
                    f"num_experts_per_tok {self.experts_per_token} is more than num_experts {self.num_experts}",
                ),
                (
                    self.experts_per_token == 1,
                    "num_experts_per_tok is 1: the one expert's weight is always 1, which teaches the router nothing",
                ),
                (
                    bool(text.get("mlp_only_layers")) or text.get("decoder_sparse_step", 1) != 1,
                    "mlp_only_layers or decoder_sparse_step: some layers have no experts",
                ),
                (bool(text.get("mtp_use_dedicated_embeddings")), "mtp_use_dedicated_embeddings is set"),
            ]
            if wrong
        ]
        if faults:
            raise UserError(f"{where}: {'; '.join(faults)}: can't be trained here; choose another Qwen3.5 checkpoint")

    @property
    def is_moe(self) -> bool:
        return self.num_experts is not None

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every decoder layer, first to last."""
        return tuple(
            "linear_attention" if (layer + 1) % self.full_attention_interval else "full_attention"
            for layer in range(self.num_layers)
        )

    def parameters(self, mtp_num_layers: int = 0) -> int:
        """Number of parameters of the text model, embedding and head included, with ``mtp_num_layers`` MTP layers."""
        return self._count(mtp_num_layers, self.num_experts or 0)

    def active_parameters(self, mtp_num_layers: int = 0) -> int:
        """Like `parameters`, but counting only the experts that one token visits: the N in 6 N D."""
        return self._count(mtp_num_layers, self.experts_per_token or 0)

    def _count(self, mtp_num_layers: int, experts: int) -> int:
        attention = {
            "full_attention": self._full_attention_parameters(),
            "linear_attention": self._linear_attention_parameters(),
        }
        rest = self._mlp_parameters(experts) + 2 * self.hidden_size  # the two norms of a layer
        decoder = sum(attention[kind] + rest for kind in self.layer_kinds) + self.hidden_size
        # An MTP layer adds the projection of (embedding, hidden) and three norms to a layer of full attention.
        mtp = attention["full_attention"] + rest + 2 * self.hidden_size**2 + 3 * self.hidden_size
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return embeddings + decoder + mtp_num_layers * mtp

    def _full_attention_parameters(self) -> int:
        query_and_gate = 2 * self.num_attention_heads * self.head_dim
        key_and_value = 2 * self.num_query_groups * self.head_dim
        output = self.num_attention_heads * self.head_dim
        return self.hidden_size * (query_and_gate + key_and_value + output) + 2 * self.head_dim

    def _linear_attention_parameters(self) -> int:
        key = self.linear_num_key_heads * self.linear_key_head_dim
        value = self.linear_num_value_heads * self.linear_value_head_dim
        in_projection = self.hidden_size * (2 * key + 2 * value + 2 * self.linear_num_value_heads)
        convolution = (2 * key + value) * self.linear_conv_kernel_dim
        gates_and_norm = 2 * self.linear_num_value_heads + self.linear_value_head_dim
        return in_projection + convolution + gates_and_norm + value * self.hidden_size

    def _mlp_parameters(self, experts: int) -> int:
        if not self.is_moe:
            return 3 * self.hidden_size * self.ffn_hidden_size
        router = self.num_experts * self.hidden_size
        shared = 3 * self.hidden_size * self.shared_expert_ffn_hidden_size + self.hidden_size
        return router + shared + experts * 3 * self.hidden_size * self.expert_ffn_hidden_size


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, under either of the names that Transformers has used for them."""
    found = text.get("rope_scaling") or text.get("rope_parameters")
    return found if isinstance(found, dict) else {}


def _full_attention_interval(text: dict[str, Any], where: str) -> int | None:
    """The N of "full attention in every N-th layer", from ``layer_types``; None if the file does not list layers.

    As in Transformers, the list takes precedence; `Architecture._check` refuses an irregular one.
    """
    kinds = text.get("layer_types")
    if not kinds:
        return None
    if not isinstance(kinds, list) or "full_attention" not in kinds:
        raise UserError(f"{where}: layer_types names no full_attention layer: choose a Qwen3.5 checkpoint")
    return kinds.index("full_attention") + 1
