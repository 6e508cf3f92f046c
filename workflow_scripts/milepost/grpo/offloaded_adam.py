"""Adam on the CPU for weights on a GPU: master weights and moments stay in host memory.

Weights are updated in pieces, with double buffering in both directions: while the CPU updates one piece, the gradient
of the next is copied in and the weights of the previous one are copied out. The host holds 12 bytes per parameter;
Megatron-Core's HybridDeviceOptimizer also holds all gradients, in pinned memory that is rounded up to powers of two.
"""

import weakref
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from milepost.configuration.schema import Optimizer as Settings
from milepost.grpo.parked_memory import pinned, unpin

PIECE = 2**26  # weights


@dataclass(frozen=True)
class _Piece:
    """Consecutive weights that are updated together.

    Attributes:
        shard: the tensor of the param group that holds them; its fp32 gradient is ``shard.decoupled_grad``.
        rows: their position in the shard.
        group: the param group, which has the learning rate and the weight decay.
        master: the fp32 weights, on the CPU.
        adam: the optimizer of this piece alone.
    """

    shard: Tensor
    rows: slice
    group: dict[str, Any]
    master: nn.Parameter
    adam: torch.optim.AdamW


@dataclass(frozen=True)
class _Buffer:
    """Pinned host memory for one piece, and the event of its last copy."""

    memory: Tensor
    done: torch.cuda.Event = field(default_factory=torch.cuda.Event)

    def like(self, tensor: Tensor) -> Tensor:
        """The memory as a tensor of the same dtype and size as ``tensor``, which is flat."""
        return self.memory[: tensor.nbytes].view(tensor.dtype)


class OffloadedAdam:
    """An optimizer of flat CUDA weights, with what Megatron-Core's DistributedOptimizer uses of torch's interface.

    A weight equals its rounded master weight, so `write_weights` restores lost weights bit for bit.
    """

    def __init__(self, param_groups: list[dict[str, Any]], settings: Settings) -> None:
        self.param_groups = param_groups
        longest = max((len(shard) for group in param_groups for shard in group["params"]), default=0)
        size = 4 * min(longest, PIECE)
        self._gradients, self._weights = ([_Buffer(pinned(size)) for _ in range(2)] for _ in range(2))
        self._incoming, self._outgoing = torch.cuda.Stream(), torch.cuda.Stream()
        weakref.finalize(self, unpin, [buffer.memory for buffer in self._gradients + self._weights])
        self.pieces = [
            self._piece(shard, slice(start, min(start + PIECE, len(shard))), group, settings)
            for group in param_groups
            for shard in group["params"]
            for start in range(0, len(shard), PIECE)
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights from their gradients."""
        self._begin()
        self._fetch_gradient(0)
        for number, piece in enumerate(self.pieces):
            self._fetch_gradient(number + 1)
            gradient = self._gradients[number % 2]
            gradient.done.synchronize()
            piece.master.grad = gradient.like(piece.master)
            for name in ("lr", "weight_decay"):
                piece.adam.param_groups[0][name] = piece.group[name]
            piece.adam.step()
            piece.master.grad = None
            self._send_weights(number)
        self._end()

    @torch.no_grad()
    def write_weights(self) -> None:
        """Copy the master weights to all weights."""
        self._begin()
        for number in range(len(self.pieces)):
            self._send_weights(number)
        self._end()

    def slots(self) -> Iterator[tuple[str, Tensor, MutableMapping[Tensor, dict[str, Tensor]]]]:
        """(key, master weights, Adam's states by master weights) of every piece, always in the same order."""
        for number, piece in enumerate(self.pieces):
            yield str(number), piece.master, piece.adam.state

    def _piece(self, shard: Tensor, rows: slice, group: dict[str, Any], settings: Settings) -> _Piece:
        weights = shard[rows].detach()
        # Through pinned memory: copies from a GPU to pageable memory are many times slower.
        master = nn.Parameter(self._weights[0].like(weights).copy_(weights).to(torch.float32, copy=True))
        adam = torch.optim.AdamW([master], betas=settings.betas, eps=settings.epsilon, fused=True)
        return _Piece(shard, rows, group, master, adam)

    def _begin(self) -> None:
        for stream in (self._incoming, self._outgoing):
            stream.wait_stream(torch.cuda.current_stream())

    def _end(self) -> None:
        torch.cuda.current_stream().wait_stream(self._outgoing)

    def _fetch_gradient(self, number: int) -> None:
        """Start copying a piece's gradient into its buffer; does nothing after the last piece."""
        if number >= len(self.pieces):
            return
        piece, buffer = self.pieces[number], self._gradients[number % 2]
        with torch.cuda.stream(self._incoming):
            gradient = piece.shard.decoupled_grad[piece.rows]
            buffer.like(gradient).copy_(gradient, non_blocking=True)
            buffer.done.record()

    def _send_weights(self, number: int) -> None:
        """Round a piece's master weights into its buffer, once that is free, and start copying them to the GPU."""
        piece, buffer = self.pieces[number], self._weights[number % 2]
        weights = piece.shard[piece.rows]
        buffer.done.synchronize()
        rounded = buffer.like(weights).copy_(piece.master)
        with torch.cuda.stream(self._outgoing):
            weights.copy_(rounded, non_blocking=True)
            buffer.done.record()
