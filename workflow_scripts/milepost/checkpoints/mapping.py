"""Hub names <-> Megatron names: one table, read in both directions, for any parallel layout.

The table says, for each Megatron tensor, which Hub tensors it is made of and along which axis tensor-parallel ranks
share it out. From it come *pieces*: which block of which Hub tensor lies where in the tensor that one rank holds.
Copying the pieces one way loads a checkpoint, copying them the other way writes one; no value is ever computed, so a
round trip is bit for bit.

Where Megatron-Core stores several Hub tensors as one, each component is shared out on its own: a rank's ``linear_fc1``
is its share of the gate projection, then its share of the up projection; its ``in_proj`` is its queries, keys, values,
z, b and a. Its ``linear_qkv`` holds whole KV groups: of each the query heads, their output gates, the key, the value.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.model import bare

TEXT = "model.language_model."
VISION = "model.visual."
MTP = "mtp."
BLOCK_BYTES = 32 * 2**20
TRAINABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Rule(NamedTuple):
    """How one Megatron tensor is made of Hub tensors.

    Attributes:
        megatron: its name.
        hub: Hub name -> its axes, as names of `_dimensions`; ``a+b`` is one axis made of two components. A name with
            ``{expert}`` stands for one tensor an expert.
        axis: the axis of the Hub tensor along which components lie one after the other and tensor-parallel ranks share
            each out; None where every rank holds all of it.
        grouped: queries, gates, keys and values are interleaved by KV group.
    """

    megatron: str
    hub: dict[str, str]
    axis: int | None = None
    grouped: bool = False


OUTER = (
    Rule("embedding.word_embeddings.weight", {TEXT + "embed_tokens.weight": "vocabulary hidden"}, 0),
    Rule("decoder.final_layernorm.weight", {TEXT + "norm.weight": "hidden"}),
)
HEAD = (Rule("output_layer.weight", {"lm_head.weight": "vocabulary hidden"}, 0),)
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


class Piece(NamedTuple):
    """A block of a Hub tensor, ``hub_tensor[source]``, that is ``megatron_tensor[target]`` on one rank."""

    hub: str
    source: tuple[slice | int, ...]
    target: tuple[slice | int, ...]


class Place(NamedTuple):
    """Which of ``size`` equal shares a rank holds."""

    rank: int = 0
    size: int = 1

    def of(self, total: int, what: str) -> range:
        """This rank's part of ``total``; a `UserError` where it can't be shared out evenly."""
        if total % self.size:
            raise UserError(f"{what}: {total} can't be shared out over {self.size} ranks: choose a divisor of {total}")
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)


WHOLE = Place()


@dataclass(frozen=True)
class Binding:
    """One Megatron tensor of a given model, and the Hub tensors of a given checkpoint that it is made of.

    Attributes:
        megatron: its name, with the layer's number in the whole model.
        hub: Hub name -> shape.
        rule: the row of the table.
        experts: it holds the routed experts, which expert-parallel ranks share out along its first axis.
    """

    megatron: str
    hub: dict[str, tuple[int, ...]]
    rule: Rule
    experts: bool
    _pieces: Callable[[Place, Place], Iterator[Piece]]

    def pieces(self, tensor: Place, expert: Place = WHOLE) -> list[Piece]:
        """The blocks that the rank at ``tensor`` (for experts: expert-tensor) and ``expert`` parallel place holds."""
        return list(self._pieces(tensor, expert))


def bind(architecture: Architecture, hub: HubCheckpoint, mtp_num_layers: int) -> list[Binding]:
    """Every tensor of the text model with its Hub tensors, in the model's order, layer by layer.

    Raises:
        UserError: the checkpoint lacks a tensor, holds one that no rule covers, or one of another shape or of a type
            that can't be trained; it is named.
    """
    dimensions = _dimensions(architecture)
    bindings = [
        _bind_rule(rule, megatron, prefix, dimensions, hub)
        for rule, megatron, prefix in _rules(architecture, hub, mtp_num_layers)
    ]
    covered = {name for binding in bindings for name in binding.hub} | set(untouched(hub, mtp_num_layers))
    for name in hub:
        if name not in covered:
            raise UserError(f"{hub.folder}: no rule covers the tensor {name}: the checkpoint does not fit config.json")
    return bindings


def untouched(hub: HubCheckpoint, mtp_num_layers: int) -> list[str]:
    """Names that pass from the source checkpoint as they are: the vision tower, and MTP where it is not built."""
    prefixes = (VISION,) if mtp_num_layers else (VISION, MTP)
    return [name for name in hub if name.startswith(prefixes)]


def take_dtypes(model: nn.Module, architecture: Architecture, hub: HubCheckpoint) -> None:
    """Give every parameter, its values lost, the type that ``hub`` stores it in: what passes through is exact."""
    for binding, parameter in local_bindings(model, architecture, hub):
        dtype = reduce(torch.promote_types, (hub.entries[name].dtype for name in binding.hub))
        parameter.data = torch.empty_like(parameter, dtype=dtype)


def from_hub(
    model: nn.Module, architecture: Architecture, hub: HubCheckpoint, progress: Callable[[int], object] | None = None
) -> None:
    """Copy the weights of ``hub`` into ``model``, on each rank the part that it holds, tensor by tensor.

    ``progress`` is called with the number of bytes after each tensor. NaN or infinite weights are a `UserError`.
    """
    for binding, parameter in local_bindings(model, architecture, hub):
        tensor, expert = _places(binding)
        with torch.no_grad():
            for piece in binding.pieces(tensor, expert):
                target, at = parameter[piece.target], 0
                for values in _blocks(hub, piece):
                    refuse_non_finite(values, f"{hub.folder}: {piece.hub}")
                    target[at : at + len(values)].copy_(values)
                    at += len(values)
        if progress is not None:
            progress(parameter.nbytes)


def to_hub(model: nn.Module, architecture: Architecture, hub: HubCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """The model's weights as the full tensors of ``hub``: its names, shapes and dtypes, one Megatron tensor at a time.

    With more than one process this is collective over tensor, expert and pipeline parallel groups: every rank iterates
    to the end, and each gets every tensor, on its own device. A tensor may be the model's own storage: don't write
    to it. What `untouched` names is not among them.
    """
    own = {binding.megatron: parameter for binding, parameter in local_bindings(model, architecture, hub)}
    stages = _gathered_objects(list(own), parallel_state.get_pipeline_model_parallel_group())
    device = next(iter(own.values())).device
    for binding in bind(architecture, hub, mtp_num_layers_of(model)):
        owner = next(stage for stage, names in enumerate(stages) if binding.megatron in names)
        full: dict[str, Tensor] = {}
        if owner == parallel_state.get_pipeline_model_parallel_rank():
            full = _assemble(binding, _gathered_shards(own[binding.megatron].detach(), binding), hub)
        for name, shape in binding.hub.items():
            if len(stages) > 1:
                if name not in full:
                    full[name] = torch.empty(shape, dtype=hub.entries[name].dtype, device=device)
                group = parallel_state.get_pipeline_model_parallel_group()
                dist.broadcast(full[name], dist.get_global_rank(group, owner), group=group)
            yield name, full.pop(name)


def local_bindings(
    model: nn.Module, architecture: Architecture, hub: HubCheckpoint
) -> Iterator[tuple[Binding, nn.Parameter]]:
    """The parameters that this rank holds, each with its binding; their shapes are checked against the table."""
    bindings = {binding.megatron: binding for binding in bind(architecture, hub, mtp_num_layers_of(model))}
    core = bare(model)
    for name, parameter in core.named_parameters():
        name = _global_name(core, name)
        # The last pipeline stage of a model with tied embeddings holds a second copy of them as its head.
        tied_head = architecture.tie_embeddings and name == HEAD[0].megatron
        binding = bindings.get(OUTER[0].megatron if tied_head else name)
        if binding is None:
            raise UserError(f"no rule says which Hub tensors make the model's {name}")
        yield binding, parameter


def mtp_num_layers_of(model: nn.Module) -> int:
    """Multi-token-prediction layers that ``model`` was built with, on whatever pipeline stage they are."""
    return bare(model).config.mtp_num_layers or 0


def refuse_non_finite(values: Tensor, what: str) -> None:
    """Raise a `UserError` that names ``what`` if a value is NaN or infinite."""
    if values.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(values)):
        raise UserError(f"{what} holds NaN or infinite values: it can't be used; take another checkpoint")


def _rules(architecture: Architecture, hub: HubCheckpoint, mtp_num_layers: int) -> Iterator[tuple[Rule, str, str]]:
    """(rule, Megatron prefix, Hub prefix) for every tensor of the model, in order."""

    def layer(megatron: str, prefix: str, full_attention: bool):
        rules = (*NORMS, *(FULL_ATTENTION if full_attention else LINEAR_ATTENTION))
        if architecture.is_moe:
            fused = f"{prefix}mlp.experts.gate_up_proj" in hub
            rules += (*MOE_MLP, *(FUSED_EXPERTS if fused else SEPARATE_EXPERTS))
        else:
            rules += DENSE_MLP
        yield from ((rule, megatron, prefix) for rule in rules)

    yield OUTER[0], "", ""
    for number, kind in enumerate(architecture.layer_kinds):
        yield from layer(f"decoder.layers.{number}.", f"{TEXT}layers.{number}.", kind == "full_attention")
    yield from ((rule, "", "") for rule in (*OUTER[1:], *(() if architecture.tie_embeddings else HEAD)))
    for number in range(mtp_num_layers):
        yield from ((rule, f"mtp.layers.{number}.", MTP) for rule in MTP_OUTER)
        yield from layer(f"mtp.layers.{number}.mtp_model_layer.", f"{MTP}layers.{number}.", True)


def _dimensions(architecture: Architecture) -> dict[str, int]:
    """The sizes that the table names."""
    return {
        "one": 1,
        "hidden": architecture.hidden_size,
        "vocabulary": architecture.vocab_size,
        "head": architecture.head_dim,
        "heads": architecture.num_attention_heads,
        "groups": architecture.num_query_groups,
        "query": architecture.num_attention_heads * architecture.head_dim,
        "key_value": architecture.num_query_groups * architecture.head_dim,
        "linear_key": architecture.linear_num_key_heads * architecture.linear_key_head_dim,
        "linear_value": architecture.linear_num_value_heads * architecture.linear_value_head_dim,
        "linear_value_head": architecture.linear_value_head_dim,
        "linear_value_heads": architecture.linear_num_value_heads,
        "kernel": architecture.linear_conv_kernel_dim,
        "ffn": architecture.ffn_hidden_size or 0,
        "experts": architecture.num_experts or 0,
        "expert_ffn": architecture.expert_ffn_hidden_size or 0,
        "shared_ffn": architecture.shared_expert_ffn_hidden_size or 0,
    }


def _bind_rule(rule: Rule, megatron: str, prefix: str, dimensions: dict[str, int], hub: HubCheckpoint) -> Binding:
    """Resolve a row of the table for one layer, and check the Hub tensors it needs."""
    # One entry a Hub name of the row: its axes, each as the sizes of its components.
    axes = {
        prefix + name: [[dimensions[size] for size in axis.split("+")] for axis in spec.split()]
        for name, spec in rule.hub.items()
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, sizes in axes.items():
        for expert in range(dimensions["experts"] if "{expert}" in name else 1):
            shapes[name.format(expert=expert)] = tuple(sum(axis) for axis in sizes)
    for name, shape in shapes.items():
        _check_hub_tensor(hub, name, shape)
    experts = rule in FUSED_EXPERTS or rule in SEPARATE_EXPERTS

    def pieces(tensor: Place, expert: Place) -> Iterator[Piece]:
        if rule.grouped:
            yield from _grouped_pieces(list(axes), dimensions, tensor)
        elif not experts:
            yield from _component_pieces(axes, rule.axis, tensor)
        else:
            own = expert.of(dimensions["experts"], "experts")
            for piece in _component_pieces(axes, rule.axis, tensor):
                if rule in FUSED_EXPERTS:
                    yield piece._replace(source=(slice(own.start, own.stop), *piece.source[1:]))
                    continue
                for index, number in enumerate(own):
                    yield Piece(piece.hub.format(expert=number), piece.source, (index, *piece.target))

    return Binding(megatron + rule.megatron, shapes, rule, experts, pieces)


def _check_hub_tensor(hub: HubCheckpoint, name: str, shape: tuple[int, ...]) -> None:
    entry = hub.entries.get(name)
    if entry is None:
        raise UserError(f"{hub.folder}: has no tensor {name}, which config.json calls for: download the model again")
    if entry.shape != shape:
        raise UserError(f"{hub.folder}: {name} has the shape {entry.shape}, config.json makes it {shape}")
    if entry.dtype not in TRAINABLE_DTYPES:
        raise UserError(f"{hub.folder}: {name} is stored as {entry.dtype}: use a checkpoint that is not quantized")


def _component_pieces(axes: dict[str, list[list[int]]], axis: int | None, place: Place) -> Iterator[Piece]:
    """Components one after the other along ``axis``, each shared out evenly."""
    target = 0
    for name, sizes in axes.items():
        if axis is None:
            yield Piece(name, (slice(None),), (slice(None),))
            continue
        start = 0
        for component in sizes[axis]:
            own = place.of(component, name)
            before = (slice(None),) * axis
            yield Piece(
                name,
                (*before, slice(start + own.start, start + own.stop)),
                (*before, slice(target, target + len(own))),
            )
            start, target = start + component, target + len(own)


def _grouped_pieces(names: list[str], dimensions: dict[str, int], place: Place) -> Iterator[Piece]:
    """Attention's input projection, group by group: query heads, their gates, the key, the value.

    In the Hub's ``q_proj`` a head's query and gate are neighbours; Megatron-Core wants a group's queries, then gates.
    """
    query, key, value = names
    head, per_group = dimensions["head"], dimensions["heads"] // dimensions["groups"]

    def row(first: int) -> tuple[slice]:
        return (slice(first, first + head),)

    target = 0
    for group in place.of(dimensions["groups"], query):
        heads = range(group * per_group, (group + 1) * per_group)
        blocks = [(query, 2 * number) for number in heads] + [(query, 2 * number + 1) for number in heads]
        for name, block in [*blocks, (key, group), (value, group)]:
            yield Piece(name, row(block * head), row(target))
            target += head


def _blocks(hub: HubCheckpoint, piece: Piece) -> Iterator[Tensor]:
    """The Hub's values of ``piece``, some rows at a time, so that no large tensor is in memory twice."""
    entry = hub.entries[piece.hub]
    rows = range(entry.shape[0])[piece.source[0]]
    step = max(BLOCK_BYTES * entry.shape[0] // max(entry.end - entry.begin, 1), 1)
    for first in range(0, len(rows), step):
        yield hub.read(piece.hub, rows[first : first + step])[(slice(None), *piece.source[1:])]


def _assemble(binding: Binding, shards: dict[tuple[Place, Place], Tensor], hub: HubCheckpoint) -> dict[str, Tensor]:
    """Full Hub tensors from the shards that all ranks hold."""
    if len(binding.hub) == len(shards) == 1 and not binding.rule.grouped:
        (name, shape), (shard,) = next(iter(binding.hub.items())), shards.values()
        return {name: shard.to(hub.entries[name].dtype).view(shape)}
    device = next(iter(shards.values())).device
    full = {
        name: torch.empty(shape, dtype=hub.entries[name].dtype, device=device) for name, shape in binding.hub.items()
    }
    for places, shard in shards.items():
        for piece in binding.pieces(*places):
            full[piece.hub][piece.source].copy_(shard[piece.target])
    return full


def _places(binding: Binding) -> tuple[Place, Place]:
    """(tensor, expert) parallel places of this process for ``binding``."""
    if binding.experts:
        return (
            Place(
                parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
            ),
            Place(
                parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_model_parallel_world_size()
            ),
        )
    tensor = Place(
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    )
    return tensor, WHOLE


def _gathered_shards(parameter: Tensor, binding: Binding) -> dict[tuple[Place, Place], Tensor]:
    """The shards of one Megatron tensor by (tensor, expert) parallel place; one suffices where all hold the same."""
    tensor, expert = _places(binding)
    if binding.rule.axis is None:
        return {(WHOLE, WHOLE): parameter}
    if not binding.experts:
        shards = _gathered(parameter, tensor.size, parallel_state.get_tensor_model_parallel_group())
        return {(Place(rank, tensor.size), WHOLE): shard for rank, shard in enumerate(shards)}
    own_experts = torch.stack(
        _gathered(parameter, tensor.size, parallel_state.get_expert_tensor_parallel_group())
    )  # (expert-tensor ranks, own experts, ...)
    return {
        (Place(rank, tensor.size), Place(expert_rank, expert.size)): shard
        for expert_rank, shards in enumerate(
            _gathered(own_experts, expert.size, parallel_state.get_expert_model_parallel_group())
        )
        for rank, shard in enumerate(shards)
    }


def _gathered(tensor: Tensor, size: int, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensor of every rank of ``group``, by rank."""
    if size == 1:
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(tensors, tensor.contiguous(), group=group)
    return tensors


def _gathered_objects(own: list[str], group: dist.ProcessGroup) -> list[list[str]]:
    if group.size() == 1:
        return [own]
    everyone: list = [None] * group.size()
    dist.all_gather_object(everyone, own, group=group)
    return everyone


def _global_name(model: nn.Module, name: str) -> str:
    """A parameter's name with its decoder layer's number in the whole model instead of in this pipeline stage."""
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    if not found:
        return name
    number = model.decoder.layers[int(found[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[found.end() :]}"
