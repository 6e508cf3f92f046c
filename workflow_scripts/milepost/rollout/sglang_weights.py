"""Send weights from the training processes to the SGLang servers on the same GPUs, through CUDA IPC.

Every training process packs the same tensors in the same order into flat buckets on its own GPU and sends a handle to
that memory. Each server process reads the bucket on its own GPU, so no data moves between GPUs. There are two buckets:
one is filled while the servers read the other.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from milepost.checkpoints.safetensors_io import HubCheckpoint

BUCKET_BYTES = 2**30
ALIGNMENT = 256  # bytes; enough for a tensor of any dtype


def with_constants(
    named: Iterable[tuple[str, Tensor]], hub: HubCheckpoint, prefixes: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``named``, then the tensors of ``hub`` that start with one of ``prefixes`` and were not in ``named``.

    A server loses all weights when it sleeps, so those that never change must be sent too.
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
    """Send ``named`` bucket by bucket; all training processes call this together, rank 0 with the two functions.

    ``deliver(handles)`` gets one handle per training process, in rank order, and returns when the bucket has been read.
    ``readers()`` returns the ranks whose buckets will be read: PyTorch keeps the memory behind a handle until that is
    opened, so the other ranks send "" instead.
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
            will_be_read = _meet(ranks, readers)  # the previous bucket may be overwritten
        if under_way is not None:
            under_way.result()
    _meet(ranks, readers)
    torch.cuda.ipc_collect()


def _buckets(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[list[tuple[str, Tensor, int]], Tensor]]:
    """Yield buckets: a list of (name, tensor in the bucket, first byte), and the bucket's memory.

    The memory is overwritten two buckets later. A tensor larger than a bucket gets its own.
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
            # The bucket being read is `own`; both buffers have been read when the next bucket is sent.
            continue
        place = buffers[turn][used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor, non_blocking=True)
        held.append((name, place, used))
        used = -(-(used + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
    if held:
        yield held, buffers[turn][:used]


def _handle(tensors: list[tuple[str, Tensor, int]], buffer: Tensor) -> str:
    """A text with which another process on this machine can open ``buffer`` and find the tensors in it."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    monkey_patch_torch_reductions()  # use GPU UUIDs in handles: processes number GPUs differently
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
    """Synchronize all processes; return whether this rank's next bucket will be read, which rank 0 decides.

    The all-reduce is on the CPU, over gloo, so it does not wait for the GPU.
    """
    read = torch.zeros(ranks, dtype=torch.int32)
    if readers is not None:
        read[list(readers())] = 1
    if ranks > 1:
        dist.all_reduce(read)
    return bool(read[dist.get_rank() if ranks > 1 else 0])
