"""Free GPU memory temporarily: its content moves to the host and back, and tensors in it remain valid objects."""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 4096  # bytes, the unit in which host memory is pinned


class _Away(NamedTuple):
    """A storage without memory: a tensor that keeps it alive, its size in bytes, and its content, if that is kept."""

    tensor: Tensor
    size: int
    host: Tensor | None


class ParkedMemory:
    """Storages that `park` empties and `unpark` restores, with all views of them.

    The host memory is pinned, for copies at full bus speed, and kept for the next time, since pinning takes about a
    second per 4 GiB.
    """

    def __init__(self) -> None:
        self._away: dict[int, _Away] = {}
        self._host: dict[int, Tensor] = {}
        weakref.finalize(self, lambda host: unpin(host.values()), self._host)

    def park(self, tensors: Iterable[Tensor], *, keep: bool = True) -> None:
        """Free the storages of CUDA ``tensors``, except those that are parked already.

        Without ``keep`` their content is lost: `unpark` returns them uninitialized.
        """
        leaving = {key: t for t in tensors if (key := _key(t)) not in self._away}
        if keep:
            for key, tensor in leaving.items():
                self._copy_out(key, _bytes(tensor))
            torch.cuda.synchronize()
        for key, tensor in leaving.items():
            storage = tensor.untyped_storage()
            self._away[key] = _Away(tensor, storage.nbytes(), self._host[key] if keep else None)
            storage.resize_(0)

    def _copy_out(self, key: int, content: Tensor) -> None:
        if key in self._host and len(self._host[key]) != len(content):  # of an earlier storage with the same key
            unpin([self._host.pop(key)])
        if key not in self._host:
            self._host[key] = pinned(len(content))
        self._host[key].copy_(content, non_blocking=True)

    def unpark(self, tensors: Iterable[Tensor]) -> bool:
        """Restore those storages of ``tensors`` that are parked; return whether there were any."""
        coming = {_key(tensor) for tensor in tensors} & set(self._away)
        for key in coming:
            tensor, size, host = self._away.pop(key)
            tensor.untyped_storage().resize_(size)
            if host is not None:
                _bytes(tensor).copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        return bool(coming)

    def on_host(self, tensor: Tensor) -> Tensor:
        """The values of a contiguous tensor on the CPU, whether it is parked or not."""
        away = self._away.get(_key(tensor))
        if away is None:
            return tensor.detach().cpu()
        start = tensor.storage_offset() * tensor.itemsize
        values = away.host[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return values if len(away.host) == tensor.nbytes else values.clone()


def _key(tensor: Tensor) -> int:
    """The identity of a tensor's storage, which unlike its address is the same while it is parked."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def pinned(size: int) -> Tensor:
    """``size`` bytes of pinned host memory, aligned to pages. (torch rounds pinned memory up to a power of two.)

    Raises:
        MemoryError: the host can't pin that much.
    """
    memory = torch.empty(size + 2 * PAGE, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % PAGE :][:size]
    if size:
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
        except torch.cuda.CudaError as error:
            raise MemoryError(f"can't pin {size / 2**30:.1f} GiB of host memory ({error}): free some") from None
    return memory


def unpin(memories: Iterable[Tensor]) -> None:
    """Undo `pinned`, before the memory is freed: its next owner could not pin it again."""
    for memory in memories:
        if len(memory):
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
