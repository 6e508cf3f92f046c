"""Copy rows for several readers, and sum the readers' results by row again.

Each operation is the other's gradient. Both use only gathers, so they are deterministic and cheap: torch's gradient of
an index sorts the indices first, and its scatter-adds sum in whatever order GPU threads arrive.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from milepost.qwen3_5.fusion import fused


class Copies(NamedTuple):
    """The n copies of R rows: ``owners`` (n,) is the row of each copy, ``places`` (R, most) the copies of each row.

    Places count from 1; a row with fewer copies than ``most`` is padded with 0.
    """

    owners: Tensor
    places: Tensor


def find_copies(wanted: Tensor, count: int, most: int) -> tuple[Tensor, Copies]:
    """Index one copy of each row for every reader that wants it, sorted by reader, without a GPU sync.

    Args:
        wanted: (R, readers), true where a reader wants a row.
        count: n, how many are true.
        most: an upper bound of the number of readers per row.

    Returns:
        The reader of each copy (n,), and the `Copies`.
    """
    by_reader = wanted.T.contiguous()
    readers, owners = by_reader.nonzero_static(size=count).unbind(1)
    place = by_reader.flatten().cumsum(0).view_as(by_reader).T  # (R, readers)
    number = wanted.cumsum(1).where(wanted, most + 1) - 1  # within its row; unwanted ones go to a spare column
    places = owners.new_zeros(len(wanted), most + 1).scatter_(1, number, place)
    return readers, Copies(owners, places[:, :most])


def copy_rows(rows: Tensor, copies: Copies) -> Tensor:
    """(R, hidden) -> (n, hidden)."""
    return _Copy.apply(rows, *copies)


def sum_copies(values: Tensor, copies: Copies) -> Tensor:
    """(n, hidden) -> (R, hidden), each row the sum of its copies, accumulated in fp32."""
    return _Sum.apply(values, *copies)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, owners: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, owners)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _sum(ctx.saved_tensors[0], gradient), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, owners: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(owners)
        return _sum(places, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


def _sum(places: Tensor, values: Tensor) -> Tensor:
    if not len(values):
        return values.new_zeros(len(places), values.shape[1])
    return _sum_of_some(places, values)


@fused
def _sum_of_some(places: Tensor, values: Tensor) -> Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    # Add place by place: for a sum over a dimension, the compiled kernel would not read along the rows.
    parts = [
        torch.where((place > 0)[:, None], values[(place - 1).clamp(min=0)], 0).to(wide)  # (R, hidden)
        for place in places.unbind(1)
    ]
    return sum(parts[1:], parts[0]).to(values.dtype)
