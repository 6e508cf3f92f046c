"""Aggregations by name: the weight of one token in the loss of an optimizer step.

To add one, write a function ``(response_length, responses, tokens) -> weight`` here and add its name to `AGGREGATIONS`
and to `configuration.training.Aggregation`. Its arguments are the tokens of the token's own response, and the responses
and response tokens of the whole step over all ranks, so that packing does not change the weights.
"""

from collections.abc import Callable


def mean_of_response_means(response_length: int, responses: int, tokens: int) -> float:
    """GRPO's: the mean over responses of each response's mean over its tokens."""
    return 1.0 / (response_length * responses)


def token_mean(response_length: int, responses: int, tokens: int) -> float:
    """The mean over all tokens (DAPO, arXiv 2503.14476, eq. 8)."""
    return 1.0 / tokens


AGGREGATIONS: dict[str, Callable[[int, int, int], float]] = {
    "mean_of_response_means": mean_of_response_means,
    "token_mean": token_mean,
}
