"""Aggregations by name: what one token weighs in the loss of an optimizer step.

A new one is a function ``(response_length, responses, tokens) -> weight`` here, with its name in `AGGREGATIONS` and in
`configuration.training.Aggregation`. Its arguments count tokens of the token's own response, and responses and response
tokens of the whole step over all ranks, so that a step weighs the same however it is packed.
"""

from collections.abc import Callable


def mean_of_response_means(response_length: int, responses: int, tokens: int) -> float:
    """GRPO's own: the mean over responses of the mean over each one's tokens."""
    return 1.0 / (response_length * responses)


def token_mean(response_length: int, responses: int, tokens: int) -> float:
    """The mean over all tokens (DAPO, arXiv 2503.14476, eq. 8)."""
    return 1.0 / tokens


AGGREGATIONS: dict[str, Callable[[int, int, int], float]] = {
    "mean_of_response_means": mean_of_response_means,
    "token_mean": token_mean,
}
