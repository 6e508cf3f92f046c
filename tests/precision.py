"""Numerical bounds that hold on any processor: a small multiple of an independent computation's error.

Rounding error depends on the processor, whose vector width determines the order of sums, and on cancellation, so no
bound is a constant. Three computations are compared: ours, an independent reference in fp32, and the exact result, from
the reference in float64. Ours may be `MARGIN` times as far from the exact result as the fp32 reference. If ours also
runs in float64, the bound shrinks by 2^29, the ratio of the precisions, which reveals a formula that differs in the
tenth digit.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Values = Tensor | Mapping[str, Tensor]

# In 1500 comparisons under three instruction sets, ours was by chance at most 2.8 times as far off as the reference; a
# wrong formula is thousands of times as far off.
MARGIN = 8
WRONG = 0.01  # fp32 rounding never changes a result this much


class _Float64(TorchDispatchMode):
    """Use float64 wherever fp32 is requested."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = kwargs | {"dtype": torch.float64}
        return function(*args, **kwargs)


@contextmanager
def in_float64() -> Iterator[None]:
    """Build and run models entirely in float64, forward and backward, even where they request fp32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)


def computing_in(dtype: torch.dtype) -> AbstractContextManager[None]:
    """`in_float64` if that is the dtype, nothing for a narrower one."""
    return in_float64() if dtype == torch.float64 else nullcontext()


def kind_of(name: str) -> str:
    """A parameter's name without its layer's number, so that the same parameter of all layers is compared together.

    The gates of Gated DeltaNet have one value per head, too few to estimate a rounding error.
    """
    return re.sub(r"layers\.\d+\.", "", name)


def norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The 2-norm of each kind of parameter over all layers."""
    squares: dict[str, float] = defaultdict(float)
    for name, tensor in tensors.items():
        squares[kind_of(name)] += tensor.detach().double().square().sum().item()
    return {kind: math.sqrt(square) for kind, square in squares.items()}


def differences(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """found - exact by name, in float64."""
    return {name: tensor.detach().double() - exact[name].detach() for name, tensor in found.items()}


def allowed_errors(
    reference: Mapping[str, Tensor], exact: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """The allowed distance from ``exact``, as a norm over all layers, for each kind of parameter computed in ``dtype``.

    Args:
        reference: by name, an independent computation, in fp32.
        exact: the same in float64.
    """
    ours, theirs = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    errors, scales = norms(differences(reference, exact)), norms(exact)
    wrong = {kind: error for kind, error in errors.items() if not error <= WRONG * scales[kind]}
    assert not wrong, f"the fp32 reference computes something else than the exact one: {wrong}"
    # An error below one rounding of the result is chance.
    return {kind: MARGIN * ours * max(error / theirs, scales[kind]) for kind, error in errors.items()}


def assert_as_precise(found: Values, reference: Values, exact: Values) -> None:
    """Assert that ``found``, for its dtype, is as close to ``exact`` as ``reference`` is in fp32.

    Each is a tensor, or a mapping of the same names to tensors. For only a few numbers use `assert_sum_as_precise`,
    since the reference may match them by chance.
    """
    found, reference, exact = (x if isinstance(x, Mapping) else {"values": x} for x in (found, reference, exact))
    assert found.keys() == exact.keys() == reference.keys()
    (dtype,) = {tensor.dtype for tensor in found.values()}
    allowed = allowed_errors(reference, exact, dtype)
    errors = norms(differences(found, exact))
    wrong = {kind: (error, allowed[kind]) for kind, error in errors.items() if not error <= allowed[kind]}
    assert not wrong, f"(error, allowed) by kind: {wrong}"


def assert_sum_as_precise(found: float | Tensor, dtype: torch.dtype, reference: Tensor, exact: Tensor) -> None:
    """Assert that ``found``, computed in ``dtype``, is as close to the sum of ``exact`` as ``reference`` allows."""
    ours, theirs = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    error, off = abs(float(found) - exact.sum().item()), (reference.detach().double() - exact).abs().sum().item()
    assert off <= WRONG * exact.abs().sum().item(), "the fp32 reference computes something else than the exact one"
    assert error <= MARGIN * ours * max(off / theirs, exact.abs().sum().item())
