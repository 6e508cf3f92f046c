"""Sums over whole responses, however their tokens are packed and laid out over ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Responses:
    """Which of N tokens belong to which of a pack's S responses.

    Attributes:
        counts: (S,) tokens of each response among the N, which are in the order of the responses.
        lengths: (S,) tokens of each response over all ranks of ``group``.
        group: the context-parallel ranks, which share responses; None for one.
    """

    counts: Tensor
    lengths: Tensor
    group: ProcessGroup | None = None

    def sums(self, values: Tensor) -> Tensor:
        """For each token the sum over its whole response: (N,) -> (N,), without gradient.

        Every rank of ``group`` calls this. Sums are taken in float64, so that their order leaves no trace in fp32.
        """
        return self._spread(self._sums(values), values)

    def means(self, values: Tensor) -> Tensor:
        """For each token the mean over its whole response, as in `sums`."""
        return self._spread(self._sums(values) / self.lengths, values)

    def _sums(self, values: Tensor) -> Tensor:
        # A scatter would add in whatever order a GPU's threads come.
        sums = torch.segment_reduce(values.detach().double(), "sum", lengths=self.counts, unsafe=True)
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(sums, group=self.group)
        return sums

    def _spread(self, of_responses: Tensor, values: Tensor) -> Tensor:
        return of_responses.to(values.dtype).repeat_interleave(self.counts, output_size=len(values))
