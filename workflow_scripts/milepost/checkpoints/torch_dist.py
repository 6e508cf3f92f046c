"""Megatron-Core distributed checkpoints (torch_dist): saved under one parallel layout, loaded under any other.

The format is Megatron-Core's, written and read through its ``dist_checkpointing``. Names and conventions are those of
its own GPTModel, which can load these checkpoints. Two things differ from its defaults, both to save host memory: the
writer copies one tensor at a time to the host (by default, everything a rank writes at once), and the reader fills the
model's own storage (by default, it copies every tensor that is stored in components).

Every function here is collective: all processes of the job must call it.
"""

import math
import os
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint import save as write_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _write_item
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from milepost.checkpoints.folders import finish_folder, partial_folder, start_folder
from milepost.common.errors import UserError
from milepost.common.files import require_room
from milepost.qwen3_5.experts import is_expert
from milepost.qwen3_5.model import bare

MAX_FILES = 8  # per rank
FILE_BYTES = 2**29
# Gated DeltaNet's norm scales by its weight, Qwen3.5's others by 1 + weight. Megatron-Core has one convention for all,
# so this weight is stored less 1; in float64, since the difference would be rounded in float32.
OUT_NORM = ".self_attention.out_norm.weight"
OLD_NORMS = re.compile(r"\.(input|pre_mlp)_layernorm\.weight$")  # what `qwen3_5.specs` renames
# All names that a .metadata contains, besides torch's dtypes.
DESCRIPTIONS = {
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
}

# Called with the number of bytes after each tensor.
Progress = Callable[[int], object]


def save(model: nn.Module, folder: Path | str, progress: Progress | None = None) -> None:
    """Write the weights of ``model`` to ``folder``, atomically; `UserError` if the disk lacks room."""
    partial = partial_folder(folder)
    if dist.get_rank() == 0:
        start_folder(partial)
    dist.barrier()
    require_room(partial, whole_bytes(model))
    state = _sharded_state_dict(model)
    for norm in _out_norms(state):
        norm.data = norm.data.double() - 1
        norm.dtype = norm.data.dtype
    try:
        dist_checkpointing.save(state, str(partial), _OneTensorAtATime(progress))
    except CheckpointException as error:  # raised on every rank, with every rank's error, e.g. a full disk
        raise next((cause for cause, _ in error.failures.values() if isinstance(cause, OSError)), error) from error
    if dist.get_rank() == 0:
        finish_folder(partial, folder)
    dist.barrier()


def whole_bytes(model: nn.Module) -> int:
    """The size of this pipeline stage's weights on disk, where every shard is stored once."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    routed = (
        parallel_state.get_expert_model_parallel_world_size() * parallel_state.get_expert_tensor_parallel_world_size()
    )
    total = 0
    for parameter in model.parameters():
        if is_expert(parameter):
            total += parameter.nbytes * routed
        else:
            total += parameter.nbytes * (tensor if getattr(parameter, "tensor_model_parallel", False) else 1)
    return total


def load(model: nn.Module, folder: Path | str) -> None:
    """Load the weights of ``model`` from ``folder``, each cast to its dtype in the model.

    Tensors that the model lacks (an MTP layer) are ignored. A missing folder or tensor, a wrong shape or a damaged file
    is a `UserError`.
    """
    state = _sharded_state_dict(model)
    apply_factories(state)  # into views of the parameters' own storage
    _check(state, Path(folder))
    norms = [(norm, norm.data) for norm in _out_norms(state)]
    for norm, parameter in norms:
        norm.data = torch.empty_like(parameter, dtype=torch.float64)
        norm.dtype = norm.data.dtype
    try:
        dist_checkpointing.load(state, str(folder))
    except (CheckpointException, CheckpointingException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder}: damaged ({reason}): delete it and run again") from error
    with torch.no_grad():
        for norm, parameter in norms:
            parameter.copy_(norm.data + 1)


def mtp_num_layers(folder: Path | str) -> int:
    """How many multi-token-prediction layers a checkpoint holds."""
    return len({name.split(".")[2] for name in _tensors(Path(folder)) if name.startswith("mtp.layers.")})


def _sharded_state_dict(model: nn.Module) -> dict[str, Any]:
    """The parameters of ``model`` as Megatron-Core's sharded tensors, which share their storage."""
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = bare(model).sharded_state_dict(metadata=groups)
    # Transformer Engine keeps FP8 scales in these entries; without it they are empty.
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _out_norms(state: dict[str, Any]) -> list[ShardedTensor]:
    return [tensor for name, tensor in state.items() if name.endswith(OUT_NORM)]


class _OneTensorAtATime(TorchDistSaveShardedStrategy):
    """Megatron-Core's plan and layout, written by torch's synchronous `save` through `_StreamingWriter`."""

    def __init__(self, progress: Progress | None) -> None:
        super().__init__()
        self.progress = progress

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        write_checkpoint(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=_StreamingWriter(checkpoint_dir, self.progress),
            planner=MCoreSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )


class _StreamingWriter(FileSystemWriter):
    """Writes a few files per rank in parallel, each one tensor at a time.

    torch's writer keeps everything that it copied to the host until its file is complete.
    """

    def __init__(self, folder: Path, progress: Progress | None) -> None:
        super().__init__(folder)
        self.progress = progress or (lambda written: None)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        buckets = _buckets(plan.items)
        names = [f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}" for number in range(len(buckets))]
        with ThreadPoolExecutor(max(len(buckets), 1)) as pool:
            results = pool.map(self._write_file, names, buckets, repeat(planner))
            done: Future[list[WriteResult]] = Future()
            done.set_result([result for of_file in results for result in of_file])
        return done

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        with (self.path / name).open("wb") as stream:
            for item in items:
                data = _host_data(planner, item)
                results.append(_write_item(self.transforms, stream, data, item, name, self.serialization_format))
                self.progress(getattr(data, "nbytes", 0))
            stream.flush()
            os.fsync(stream.fileno())
        return results


def _buckets(items: list[WriteItem]) -> list[list[WriteItem]]:
    """Distribute ``items`` over up to `MAX_FILES` files of about `FILE_BYTES` or more each."""
    sizes = {item.index: _bytes(item) for item in items}
    count = min(max(sum(sizes.values()) // FILE_BYTES, 1), MAX_FILES, len(items))
    buckets, filled = [[] for _ in range(count)], [0] * count
    for item in sorted(items, key=lambda item: -sizes[item.index]):
        emptiest = filled.index(min(filled))
        buckets[emptiest].append(item)
        filled[emptiest] += sizes[item.index]
    return buckets


def _bytes(item: WriteItem) -> int:
    if item.type == WriteItemType.BYTE_IO:
        return 0
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _host_data(planner: SavePlanner, item: WriteItem) -> Any:
    """The data of ``item``: bytes, or a CPU tensor whose storage holds nothing else."""
    data = planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        return data
    data = data.detach().cpu()
    return data if data.untyped_storage().nbytes() == data.nbytes else data.clone()


def _check(state: dict[str, Any], folder: Path) -> None:
    """Check that every tensor of ``state`` is in the checkpoint with its global shape."""
    stored = _tensors(folder)
    for wanted in nested_values(state):
        found = stored.get(wanted.key)
        if found is None and wanted.key.endswith("layer_norm_weight") and any(map(OLD_NORMS.search, stored)):
            raise UserError(
                f"{folder}: written by an earlier version, which named norms otherwise: go on with that version, or"
                " delete it and run again"
            )
        if found is None:
            raise UserError(f"{folder}: has no tensor {wanted.key}: it holds another model; delete it and run again")
        if tuple(found.global_shape) != tuple(wanted.global_shape):
            raise UserError(
                f"{folder}: {wanted.key} has the shape {tuple(found.global_shape)}, in the model"
                f" {tuple(wanted.global_shape)}: it holds another model; delete it and run again"
            )


def _tensors(folder: Path) -> dict[str, ShardedTensor]:
    """Name -> global shape and dtype of a checkpoint's tensors."""
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise UserError(f"{folder}: not a torch_dist checkpoint: run again to make it")
    try:
        with (folder / ".metadata").open("rb") as metadata:
            _HarmlessUnpickler(metadata).load()
        return dist_checkpointing.load_tensors_metadata(str(folder))
    except (OSError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        raise UserError(f"{folder}: its .metadata can't be read ({error}): delete it and run again") from error


class _HarmlessUnpickler(pickle.Unpickler):
    """Loads a checkpoint's only pickle, its .metadata, if it creates nothing but descriptions of tensors.

    A pickle can call anything that it names, so it is checked here before torch reads it.
    """

    def find_class(self, module: str, name: str) -> Any:
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or name in DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would call {module}.{name}")
