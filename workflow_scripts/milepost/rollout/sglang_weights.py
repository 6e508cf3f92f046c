"""Weights from the training processes' GPUs into the servers on the same GPUs, through CUDA IPC.

Every training process packs the same tensors in the same order into flat buckets on its own GPU. What goes to a server
is a handle to that memory: the server's process on a GPU reads the bucket that lies there, so nothing crosses to
another GPU. Two buckets take turns: one is filled while the servers read the other.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from milepost.checkpoints.safetensors_io import HubCheckpoint

BUCKET_BYTES = 2**30
ALIGNMENT = 256  # bytes; a tensor of any type may begin there


def with_constants(
    named: Iterable[tuple[str, Tensor]], hub: HubCheckpoint, prefixes: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """``named``, then those tensors of ``hub`` that were not among them and whose names start with a prefix.

    A server that has slept remembers nothing: what never changes must be sent as well.
    """
    sent = set()
    for name, tensor in named:
        sent.add(name)
        yield name, tensor
    for name in hub:
        if name not in sent and name.startswith(prefixes):
            yield name, hub.read(name)


def send(
    named: Iterable[tuple[str, Tensor]],
    deliver: Callable[[list[str]], None] | None = None,
    readers: Callable[[], Iterable[int]] | None = None,
) -> None:
    """Hand ``named`` over, bucket by bucket; all training processes call this together, rank 0 with the functions.

    ``deliver(handles)`` gets one handle a training process, in the order of ranks, and returns when the bucket has
    been read. ``readers()`` says whose buckets will be: PyTorch keeps the memory behind a handle until it was opened,
    so the others get the text "" instead of one.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    under_way: Future | None = None
    with ThreadPoolExecutor(1) as pool:
        will_be_read = _meet(ranks, readers)
        for tensors, buffer in _buckets(named):
            torch.cuda.current_stream().synchronize()
            handles = _gathered(_handle(tensors, buffer) if will_be_read else "", ranks)
            if under_way is not None:
                under_way.result()
            if deliver is not None:
                under_way = pool.submit(deliver, handles)
            will_be_read = _meet(ranks, readers)  # the bucket before this one may be filled anew
        if under_way is not None:
            under_way.result()
    _meet(ranks, readers)
    torch.cuda.ipc_collect()


def _buckets(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[list[tuple[str, Tensor, int]], Tensor]]:
    """Buckets as (name, tensor's place and type, first byte) of what they hold, and the memory itself.

    The memory is written again two buckets later. A tensor that is larger than a bucket has one of its own.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    buffers = [torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    turn, held, used = 0, [], 0
    for name, tensor in named:
        if held and used + tensor.nbytes > BUCKET_BYTES:
            yield held, buffers[turn][:used]
            turn, held, used = 1 - turn, [], 0
        if tensor.nbytes > BUCKET_BYTES:
            own = tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)
            yield [(name, tensor, 0)], own
            # The one under way is `own`, and both buffers have been read when the next bucket is handed over.
            continue
        place = buffers[turn][used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor, non_blocking=True)
        held.append((name, place, used))
        used = -(-(used + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
    if held:
        yield held, buffers[turn][:used]


def _handle(tensors: list[tuple[str, Tensor, int]], buffer: Tensor) -> str:
    """What lets another process on this machine open ``buffer`` and find the tensors in it, as text."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    monkey_patch_torch_reductions()  # handles name a GPU by its UUID: processes number them differently
    metadata = [
        FlattenedTensorMetadata(
            name=name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            start_idx=first,
            end_idx=first + tensor.nbytes,
            numel=tensor.nbytes,
        )
        for name, tensor, first in tensors
    ]
    return MultiprocessingSerializer.serialize({"flattened_tensor": buffer, "metadata": metadata}, output_str=True)


def _gathered(handle: str, ranks: int) -> list[str]:
    """All ranks' handles, on rank 0."""
    if ranks == 1:
        return [handle]
    handles: list[str] = [""] * ranks
    dist.gather_object(handle, handles if dist.get_rank() == 0 else None, dst=0)
    return handles


def _meet(ranks: int, readers: Callable[[], Iterable[int]] | None) -> bool:
    """All processes wait for one another; whether rank 0 says that this one's next bucket will be read.

    The GPU is left alone: a sum of numbers on the CPU goes over gloo.
    """
    read = torch.zeros(ranks, dtype=torch.int32)
    if readers is not None:
        read[list(readers())] = 1
    if ranks > 1:
        dist.all_reduce(read)
    return bool(read[dist.get_rank() if ranks > 1 else 0])
