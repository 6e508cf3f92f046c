"""Rows that are copied for several readers, and what the readers made of them, summed again by row.

Each is the other's gradient. Written with gathers alone both give the same bits every time; torch's own gradient of an
index sorts the indices first, and its sums by index add in whatever order the GPU's threads come.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen3_5.fusion import fused


class Copies(NamedTuple):
    """Which copies there are of ``R`` rows: ``owners`` (n,) says whose each is, ``places`` (R, most) where a row's are.

    A row with fewer copies than ``most`` has n in the places that are left.
    """

    owners: Tensor
    places: Tensor


def find_copies(owners: Tensor, rows: int, most: int) -> Copies:
    """The copies whose rows are ``owners`` (n,), no row having more than ``most``; nothing here waits for the GPU."""
    order = owners.argsort(stable=True)  # copies, by row
    row = owners[order]
    counts = owners.new_zeros(rows).index_add(0, owners, torch.ones_like(owners))
    number = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[row]  # among the row's
    places = owners.new_full((rows * most,), len(owners)).scatter(0, row * most + number, order)
    return Copies(owners, places.view(rows, most))


def copy_rows(rows: Tensor, copies: Copies) -> Tensor:
    """(R, hidden) to (n, hidden)."""
    return _Copy.apply(rows, *copies)


def sum_copies(values: Tensor, copies: Copies) -> Tensor:
    """(n, hidden) to (R, hidden), the sum over a row's copies in fp32."""
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
    there = places < values.shape[0]
    chosen = values[places.clamp(max=values.shape[0] - 1)]  # (R, most, hidden)
    chosen = chosen.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(there[..., None], chosen, 0.0).sum(1).to(values.dtype)
