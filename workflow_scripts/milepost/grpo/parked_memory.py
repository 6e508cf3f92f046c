"""GPU memory that is given back for a while: its content waits on the host, and every tensor in it stays valid."""

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 4096  # bytes, the unit in which the host's memory is pinned


class _Away(NamedTuple):
    """A storage without memory: a tensor that keeps it alive, its size in bytes, and where they are kept, if so."""

    tensor: Tensor
    size: int
    host: Tensor | None


class ParkedMemory:
    """Storages that `park` shrinks to nothing and `unpark` fills again; what is a view of them need not know.

    The host memory is kept and pinned, so that copies run at the bus's full speed: it is as large as all that
    was ever away at a time, and taking it for the first time costs about a second for 4 GiB.
    """

    def __init__(self) -> None:
        self._away: dict[int, _Away] = {}
        self._host: dict[int, Tensor] = {}
        weakref.finalize(self, lambda host: unpin(host.values()), self._host)

    def park(self, tensors: Iterable[Tensor], *, keep: bool = True) -> None:
        """Send the storages of CUDA ``tensors`` away; those that are away already stay so.

        What is not to be kept comes back with nothing that means anything in it.
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
        if key in self._host and len(self._host[key]) != len(content):  # an earlier storage that lay here
            unpin([self._host.pop(key)])
        if key not in self._host:
            self._host[key] = pinned(len(content))
        self._host[key].copy_(content, non_blocking=True)

    def unpark(self, tensors: Iterable[Tensor]) -> bool:
        """Bring the storages of ``tensors`` back, those that are away; whether there were any."""
        coming = {_key(tensor) for tensor in tensors} & set(self._away)
        for key in coming:
            tensor, size, host = self._away.pop(key)
            tensor.untyped_storage().resize_(size)
            if host is not None:
                _bytes(tensor).copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        return bool(coming)

    def on_host(self, tensor: Tensor) -> Tensor:
        """The values of a contiguous tensor, wherever they are now, on the CPU."""
        away = self._away.get(_key(tensor))
        if away is None:
            return tensor.detach().cpu()
        start = tensor.storage_offset() * tensor.itemsize
        values = away.host[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return values if len(away.host) == tensor.nbytes else values.clone()


def _key(tensor: Tensor) -> int:
    """Which storage a tensor lies in; unlike its address it stays the same without memory."""
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> Tensor:
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def pinned(size: int) -> Tensor:
    """Host memory of ``size`` bytes, on pages of its own, that the GPU can copy to and from by itself.

    (torch's pinned memory is rounded up to a power of two.) `MemoryError` where the host has not as much to pin.
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
    """Undo `pinned`; the memory may be given to others afterwards, who could not pin it again."""
    for memory in memories:
        if len(memory):
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
