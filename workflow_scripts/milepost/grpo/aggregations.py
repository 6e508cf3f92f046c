"""Aggregations by name: the weight of one token in the loss of an optimizer step.

To add one, write a function ``(response_length, step) -> weight`` here and add its name to `AGGREGATIONS` and to
`configuration.training.Aggregation`. Its arguments are the tokens of the token's own response, and counts of the whole
step over all ranks, so that packing does not change the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTotals:
    """An optimizer step's counts over all ranks. Every mean divides by these, so packing does not change it.

    Attributes:
        responses: the number that the loss is taken over.
        tokens: of those responses.
        constant_length: the length that `constant_length` divides by.
    """

    responses: int
    tokens: int
    constant_length: int


def mean_of_response_means(response_length: int, step: StepTotals) -> float:
    """GRPO's: the mean over responses of each response's mean over its tokens (arXiv 2402.03300, eq. 3)."""
    return 1.0 / (response_length * step.responses)


def token_mean(response_length: int, step: StepTotals) -> float:
    """The mean over all tokens (DAPO, arXiv 2503.14476, eq. 8)."""
    return 1.0 / step.tokens


def constant_length(response_length: int, step: StepTotals) -> float:
    """The mean over responses of each response's sum over its tokens, over a constant (Dr. GRPO, arXiv 2503.20783)."""
    return 1.0 / (step.constant_length * step.responses)


AGGREGATIONS: dict[str, Callable[[int, StepTotals], float]] = {
    "mean_of_response_means": mean_of_response_means,
    "token_mean": token_mean,
    "constant_length": constant_length,
}
