"""Aggregations by name: what one token weighs in the loss of an optimizer step.

A new one is a function ``(response_length, step) -> weight`` here, with its name in `AGGREGATIONS` and in
`configuration.training.Aggregation`. Weights depend on the token's own response and on counts of the whole step over
all ranks, so that a step weighs the same however it is packed.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTotals:
    """What one optimizer step holds over all ranks; every mean is taken over these, however the step is packed.

    Attributes:
        responses: that count in the loss.
        tokens: of those responses.
        constant_length: tokens that stand for every response's length where `constant_length` is asked for.
    """

    responses: int
    tokens: int
    constant_length: int


def mean_of_response_means(response_length: int, step: StepTotals) -> float:
    """GRPO's own: the mean over responses of the mean over each one's tokens (arXiv 2402.03300, eq. 3)."""
    return 1.0 / (response_length * step.responses)


def token_mean(response_length: int, step: StepTotals) -> float:
    """The mean over all tokens (DAPO, arXiv 2503.14476, eq. 8)."""
    return 1.0 / step.tokens


def constant_length(response_length: int, step: StepTotals) -> float:
    """The mean over responses of the sum over each one's tokens, divided by a constant (Dr. GRPO, arXiv 2503.20783)."""
    return 1.0 / (step.constant_length * step.responses)


AGGREGATIONS: dict[str, Callable[[int, StepTotals], float]] = {
    "mean_of_response_means": mean_of_response_means,
    "token_mean": token_mean,
    "constant_length": constant_length,
}
