"""Map blocks of Hub tensors to places in the Megatron tensor that one rank holds.

`bind` matches the table of names (`name_table`) with one architecture and one checkpoint. A `Binding` then lists the
*pieces* of a rank's shard: a block of a Hub tensor and its place in the shard. Copying the pieces one way loads a
checkpoint, copying them the other way writes one. No value is ever computed, so a round trip is bit for bit.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from milepost.checkpoints.headers import UNQUANTIZED, Headers
from milepost.checkpoints.name_table import (
    DENSE_MLP,
    FULL_ATTENTION,
    FUSED_EXPERTS,
    HEAD,
    HEAD_NAME,
    LINEAR_ATTENTION,
    MOE_MLP,
    MTP,
    MTP_OUTER,
    NORMS,
    OUTER,
    SEPARATE_EXPERTS,
    VISION,
    Rule,
    text_prefix,
)
from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture

TRAINABLE_DTYPES = ("BF16", "F16", "F32")


class Piece(NamedTuple):
    """``hub_tensor[source]`` is ``megatron_tensor[target]`` on one rank."""

    hub: str
    source: tuple[slice | int, ...]
    target: tuple[slice | int, ...]


class Place(NamedTuple):
    """A rank's position in a parallel group: it holds share ``rank`` of ``size`` equal ones."""

    rank: int = 0
    size: int = 1

    def of(self, total: int, what: str) -> range:
        """This rank's part of ``total``; a `UserError` if ``size`` does not divide it."""
        if total % self.size:
            raise UserError(
                f"{what}: {total} can't be split evenly over {self.size} ranks: choose a divisor of {total}"
            )
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)


WHOLE = Place()


@dataclass(frozen=True)
class Binding:
    """One Megatron tensor of a model, bound to the Hub tensors of a checkpoint that it is made of.

    Attributes:
        megatron: its name, with the layer's number in the whole model.
        hub: Hub name -> shape.
        rule: its row of the table.
        experts: it holds the routed experts, which expert-parallel ranks split along its first axis.
        twin: another Hub tensor with the same values: the head that some checkpoints store though it is tied to the
            embedding.
    """

    megatron: str
    hub: dict[str, tuple[int, ...]]
    rule: Rule
    experts: bool
    _pieces: Callable[[Place, Place], Iterator[Piece]]
    twin: str | None = None

    def pieces(self, tensor: Place, expert: Place = WHOLE) -> list[Piece]:
        """The blocks held by the rank at tensor-parallel (for experts: expert-tensor-parallel) place ``tensor`` and
        expert-parallel place ``expert``.
        """
        return list(self._pieces(tensor, expert))


def bind(architecture: Architecture, hub: Headers, mtp_num_layers: int) -> list[Binding]:
    """Bind every tensor of the text model to its Hub tensors, in the model's order, layer by layer.

    Raises:
        UserError: a tensor is missing, covered by no rule, of the wrong shape or of a dtype that can't be trained; the
            message names it.
    """
    require_names(str(hub.folder), architecture, hub.entries, mtp_num_layers)
    sizes_by_name = _sizes(architecture)
    bindings = [
        _bind_rule(rule, megatron, prefix, sizes_by_name, hub)
        for rule, megatron, prefix in _rules(architecture, hub.entries, mtp_num_layers)
    ]
    if architecture.tie_embeddings and HEAD_NAME in hub:
        (embedding,) = bindings[0].hub
        _check_hub_tensor(hub, HEAD_NAME, bindings[0].hub[embedding], hub.entries[embedding].dtype)
        bindings[0] = replace(bindings[0], twin=HEAD_NAME)
    return bindings


def require_names(source: str, architecture: Architecture, names: Collection[str], mtp_num_layers: int) -> None:
    """Refuse (`UserError`) a checkpoint whose tensors' ``names`` are not those of ``architecture``.

    Args:
        source: the checkpoint's folder or repository, for the message.
        mtp_num_layers: 1 if the MTP layer is used, too.
    """
    if mtp_num_layers and not any(name.startswith(MTP) for name in names):
        raise UserError(
            f"{source}: has no MTP layer (no tensor {MTP}*): set conversion: {{mtp_num_layers: 0}},"
            " mtp: {train: false} and engine: {speculation: null}, or use a checkpoint that has kept it"
        )
    needed = set()
    for rule, _, prefix in _rules(architecture, names, mtp_num_layers):
        for name in rule.hub:
            experts = range(architecture.num_experts) if "{expert}" in name else range(1)
            needed.update(prefix + name.format(expert=expert) for expert in experts)
    if missing := needed - set(names):
        raise UserError(
            f"{source}: has no tensor {min(missing)} ({len(missing)} missing), which config.json calls for: use a"
            " complete checkpoint, with its own config.json"
        )
    tied_head = {HEAD_NAME} if architecture.tie_embeddings else set()
    if unknown := set(names) - needed - tied_head - set(untouched(names, mtp_num_layers)):
        raise UserError(
            f"{source}: no rule covers the tensor {min(unknown)} ({len(unknown)} such): use a checkpoint of a plain"
            " Qwen3.5, with adapters merged and not quantized"
        )


def untouched(names: Iterable[str], mtp_num_layers: int) -> list[str]:
    """Names of tensors that an export copies unchanged: the vision tower, and the MTP layer unless it is built."""
    prefixes = (VISION,) if mtp_num_layers else (VISION, MTP)
    return [name for name in names if name.startswith(prefixes)]


def _rules(architecture: Architecture, names: Collection[str], mtp_num_layers: int) -> Iterator[tuple[Rule, str, str]]:
    """(rule, Megatron prefix, Hub prefix) for every tensor of the model, in order."""
    text = text_prefix(names)

    def layer(megatron: str, prefix: str, full_attention: bool):
        rules = (*NORMS, *(FULL_ATTENTION if full_attention else LINEAR_ATTENTION))
        if architecture.is_moe:
            fused = f"{prefix}mlp.experts.gate_up_proj" in names
            rules += (*MOE_MLP, *(FUSED_EXPERTS if fused else SEPARATE_EXPERTS))
        else:
            rules += DENSE_MLP
        yield from ((rule, megatron, prefix) for rule in rules)

    yield OUTER[0], "", text
    for number, kind in enumerate(architecture.layer_kinds):
        yield from layer(f"decoder.layers.{number}.", f"{text}layers.{number}.", kind == "full_attention")
    yield OUTER[1], "", text
    if not architecture.tie_embeddings:
        yield HEAD[0], "", ""
    for number in range(mtp_num_layers):
        yield from ((rule, f"mtp.layers.{number}.", MTP) for rule in MTP_OUTER)
        yield from layer(f"mtp.layers.{number}.mtp_model_layer.", f"{MTP}layers.{number}.", True)


def _sizes(architecture: Architecture) -> dict[str, int]:
    """The sizes that the table's axes are named by."""
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


def _bind_rule(rule: Rule, megatron: str, prefix: str, sizes_by_name: dict[str, int], hub: Headers) -> Binding:
    """Resolve a row of the table for one layer, and check the Hub tensors that it needs."""
    # Hub name -> its axes, each a list of its components' sizes.
    axes = {
        prefix + name: [[sizes_by_name[size] for size in axis.split("+")] for axis in spec.split()]
        for name, spec in rule.hub.items()
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, sizes in axes.items():
        for expert in range(sizes_by_name["experts"] if "{expert}" in name else 1):
            shapes[name.format(expert=expert)] = tuple(sum(axis) for axis in sizes)
    for name, shape in shapes.items():
        _check_hub_tensor(hub, name, shape)
    experts = rule in FUSED_EXPERTS or rule in SEPARATE_EXPERTS

    def pieces(tensor: Place, expert: Place) -> Iterator[Piece]:
        if rule.grouped:
            yield from _grouped_pieces(list(axes), sizes_by_name, tensor)
        elif not experts:
            yield from _component_pieces(axes, rule.axis, tensor)
        else:
            own = expert.of(sizes_by_name["experts"], "experts")
            for piece in _component_pieces(axes, rule.axis, tensor):
                if rule in FUSED_EXPERTS:
                    yield piece._replace(source=(slice(own.start, own.stop), *piece.source[1:]))
                    continue
                for index, number in enumerate(own):
                    yield Piece(piece.hub.format(expert=number), piece.source, (index, *piece.target))

    return Binding(megatron + rule.megatron, shapes, rule, experts, pieces)


def _check_hub_tensor(hub: Headers, name: str, shape: tuple[int, ...], dtype: str | None = None) -> None:
    entry = hub.entries[name]
    if entry.shape != shape:
        raise UserError(
            f"{hub.folder}: {name} has the shape {entry.shape}, config.json makes it {shape}: use a checkpoint that"
            " fits its config.json"
        )
    if entry.dtype not in TRAINABLE_DTYPES:
        raise UserError(f"{hub.folder}: {name} is stored as {entry.dtype}, which can't be trained: {UNQUANTIZED}")
    if dtype and entry.dtype != dtype:
        raise UserError(
            f"{hub.folder}: {name} is stored as {entry.dtype}, the embedding that it is tied to as {dtype}: remove it"
        )


def _component_pieces(axes: dict[str, list[list[int]]], axis: int | None, place: Place) -> Iterator[Piece]:
    """The pieces of components that are concatenated along ``axis``, each split evenly over the ranks."""
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


def _grouped_pieces(names: list[str], sizes_by_name: dict[str, int], place: Place) -> Iterator[Piece]:
    """The pieces of attention's input projection, group by group: query heads, their gates, the key, the value.

    The Hub's ``q_proj`` stores each head's query next to its gate; Megatron-Core expects a group's queries, then its
    gates.
    """
    query, key, value = names
    head, per_group = sizes_by_name["head"], sizes_by_name["heads"] // sizes_by_name["groups"]

    def row(first: int) -> tuple[slice]:
        return (slice(first, first + head),)

    target = 0
    for group in place.of(sizes_by_name["groups"], query):
        heads = range(group * per_group, (group + 1) * per_group)
        blocks = [(query, 2 * number) for number in heads] + [(query, 2 * number + 1) for number in heads]
        for name, block in [*blocks, (key, group), (value, group)]:
            yield Piece(name, row(block * head), row(target))
            target += head
