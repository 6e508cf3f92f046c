"""Copy weights between Hub checkpoints and Megatron models, under any parallel layout.

`from_hub` loads and `to_hub` writes; both copy the pieces that `shards` lists, so a round trip is bit for bit.
"""

import re
from collections.abc import Callable, Iterator
from functools import reduce

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from milepost.checkpoints.name_table import HEAD, OUTER
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.checkpoints.shards import WHOLE, Binding, Piece, Place, bind
from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.model import bare

BLOCK_BYTES = 32 * 2**20


def take_dtypes(model: nn.Module, architecture: Architecture, hub: HubCheckpoint) -> None:
    """Reallocate every parameter in the dtype that ``hub`` stores it in, so that a copy is exact; values are lost."""
    for binding, parameter in local_bindings(model, architecture, hub):
        dtype = reduce(torch.promote_types, (hub.dtype(name) for name in binding.hub))
        parameter.data = torch.empty_like(parameter, dtype=dtype)


def from_hub(
    model: nn.Module, architecture: Architecture, hub: HubCheckpoint, progress: Callable[[int], object] | None = None
) -> None:
    """Copy the weights of ``hub`` into ``model``, tensor by tensor; each rank reads only its own shards.

    ``progress`` is called with the number of bytes after each tensor. NaN or infinite weights raise a `UserError`.
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
    """Yield the model's weights as full Hub tensors, with the names, shapes and dtypes of ``hub``.

    With more than one process this is collective over the tensor, expert and pipeline parallel groups: every rank must
    iterate to the end, and each receives every tensor on its own device. A tensor may share the model's storage: don't
    write to it. The tensors that `shards.untouched` names are not included.
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
                    full[name] = torch.empty(shape, dtype=hub.dtype(name), device=device)
                group = parallel_state.get_pipeline_model_parallel_group()
                dist.broadcast(full[name], dist.get_global_rank(group, owner), group=group)
            tensor = full.pop(name)
            yield name, tensor
            if binding.twin:
                yield binding.twin, tensor


def local_bindings(
    model: nn.Module, architecture: Architecture, hub: HubCheckpoint
) -> Iterator[tuple[Binding, nn.Parameter]]:
    """Yield this rank's parameters with their bindings."""
    bindings = {binding.megatron: binding for binding in bind(architecture, hub, mtp_num_layers_of(model))}
    core = bare(model)
    for name, parameter in core.named_parameters():
        name = _global_name(core, name)
        # The last pipeline stage of a model with tied embeddings holds a second copy of them as its head.
        tied_head = architecture.tie_embeddings and name == HEAD[0].megatron
        binding = bindings.get(OUTER[0].megatron if tied_head else name)
        if binding is None:
            raise UserError(f"no rule in name_table.py maps the model's parameter {name} to Hub tensors: add one")
        yield binding, parameter


def mtp_num_layers_of(model: nn.Module) -> int:
    """How many multi-token-prediction layers ``model`` was built with, on any pipeline stage."""
    return bare(model).config.mtp_num_layers or 0


def refuse_non_finite(values: Tensor, what: str) -> None:
    """Raise a `UserError` naming ``what`` if any value is NaN or infinite."""
    if values.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(values)):
        raise UserError(f"{what} holds NaN or infinite values: it can't be used; take another checkpoint")


def _blocks(hub: HubCheckpoint, piece: Piece) -> Iterator[Tensor]:
    """The Hub's values of ``piece``, a few rows at a time, so that no large tensor is in memory twice."""
    entry = hub.entries[piece.hub]
    rows = range(entry.shape[0])[piece.source[0]]
    step = max(BLOCK_BYTES * entry.shape[0] // max(entry.end - entry.begin, 1), 1)
    for first in range(0, len(rows), step):
        yield hub.read(piece.hub, rows[first : first + step])[(slice(None), *piece.source[1:])]


def _assemble(binding: Binding, shards: dict[tuple[Place, Place], Tensor], hub: HubCheckpoint) -> dict[str, Tensor]:
    """Assemble full Hub tensors from the shards of all ranks."""
    if len(binding.hub) == len(shards) == 1 and not binding.rule.grouped:
        (name, shape), (shard,) = next(iter(binding.hub.items())), shards.values()
        return {name: shard.to(hub.dtype(name)).view(shape)}
    device = next(iter(shards.values())).device
    full = {name: torch.empty(shape, dtype=hub.dtype(name), device=device) for name, shape in binding.hub.items()}
    for places, shard in shards.items():
        for piece in binding.pieces(*places):
            full[piece.hub][piece.source].copy_(shard[piece.target])
    return full


def _places(binding: Binding) -> tuple[Place, Place]:
    """This process's (tensor, expert) parallel places for ``binding``."""
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
    """One Megatron tensor's shards by (tensor, expert) parallel place; a replicated tensor is not gathered."""
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
    """A parameter's name with its layer numbered in the whole model instead of in this pipeline stage."""
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    if not found:
        return name
    number = model.decoder.layers[int(found[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[found.end() :]}"
