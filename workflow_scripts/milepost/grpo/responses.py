"""Sums over whole responses, for any packing and any number of context-parallel ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Responses:
    """Which of this rank's N response tokens belong to which of the pack's S responses.

    Attributes:
        counts: (S,) this rank's tokens of each response; the N tokens are in the order of the responses.
        lengths: (S,) tokens of each response over all ranks of ``group``.
        group: the context-parallel ranks, over which responses are split; None for a single rank.
    """

    counts: Tensor
    lengths: Tensor
    group: ProcessGroup | None = None

    def sums(self, values: Tensor) -> Tensor:
        """The sum over each token's whole response, without gradient: (N,) -> (N,). Every rank of ``group`` calls it.

        It is taken in float64, so that the order of summation hardly matters.
        """
        return self._spread(self._sums(values), values)

    def means(self, values: Tensor) -> Tensor:
        """The mean over each token's whole response, likewise."""
        return self._spread(self._sums(values) / self.lengths, values)

    def _sums(self, values: Tensor) -> Tensor:
        # Unlike a scatter, this adds in a fixed order on a GPU, too.
        sums = torch.segment_reduce(values.detach().double(), "sum", lengths=self.counts, unsafe=True)
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(sums, group=self.group)
        return sums

    def _spread(self, of_responses: Tensor, values: Tensor) -> Tensor:
        return of_responses.to(values.dtype).repeat_interleave(self.counts, output_size=len(values))
