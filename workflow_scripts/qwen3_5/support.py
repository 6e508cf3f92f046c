"""Which layouts of a model can run, for the check before a run: plain Python, no torch."""

from collections.abc import Iterator
from typing import Literal

from configuration.schema import Experts, Parallel
from qwen3_5.architecture import Architecture


def supported_dispatchers(device: Literal["cpu", "cuda"], expert_tensor: int = 1) -> frozenset[str]:
    """Token dispatchers that run on a device without DeepEP.

    ``alltoall`` over expert-tensor ranks gathers unequally many tokens from each, which gloo can't.
    """
    every = frozenset({"allgather", "alltoall", "flex"})
    return every - {"alltoall"} if device == "cpu" and expert_tensor > 1 else every


def layout_faults(
    architecture: Architecture, parallel: Parallel, experts: Experts, device: Literal["cpu", "cuda"]
) -> list[str]:
    """What keeps this model from being laid out so, each as ``key: what is allowed``; empty if nothing does."""
    return [f"{key}: {message}" for wrong, key, message in _rules(architecture, parallel, experts, device) if wrong]


def _rules(
    architecture: Architecture, parallel: Parallel, experts: Experts, device: Literal["cpu", "cuda"]
) -> Iterator[tuple[bool, str, str]]:
    tensor, context = parallel.tensor, parallel.context
    heads = {
        "attention heads": architecture.num_attention_heads,
        "linear-attention key heads": architecture.linear_num_key_heads,
    }
    for what, number in heads.items():
        yield (
            number % (tensor * context) != 0,
            "parallel.tensor",
            f"tensor {tensor} x context {context} must divide the {number} {what}",
        )
    groups = architecture.num_query_groups
    yield (
        groups % tensor != 0 and tensor % groups != 0,
        "parallel.tensor",
        f"{tensor} must divide, or be a multiple of, the {groups} key-value groups",
    )
    here = max(1, groups // tensor)
    yield (
        here % context != 0 and context % here != 0,
        "parallel.context",
        f"{context} must divide, or be a multiple of, the {here} key-value groups of a tensor-parallel rank",
    )
    widths = {"vocabulary": architecture.vocab_size, "ffn width": architecture.ffn_hidden_size}
    for what, number in (widths | {"shared expert's width": architecture.shared_expert_ffn_hidden_size}).items():
        yield (bool(number) and number % tensor != 0, "parallel.tensor", f"{tensor} must divide the {what} {number}")
    yield (
        architecture.num_layers % parallel.pipeline != 0,
        "parallel.pipeline",
        f"{parallel.pipeline} must divide the {architecture.num_layers} layers",
    )
    yield (
        not architecture.is_moe and parallel.expert * parallel.expert_tensor > 1,
        "parallel.expert",
        "a dense model has no experts to share out: 1",
    )
    if architecture.is_moe:
        yield from _expert_rules(architecture, parallel, experts, device)


def _expert_rules(
    architecture: Architecture, parallel: Parallel, experts: Experts, device: Literal["cpu", "cuda"]
) -> Iterator[tuple[bool, str, str]]:
    yield (
        architecture.num_experts % parallel.expert != 0,
        "parallel.expert",
        f"{parallel.expert} must divide the {architecture.num_experts} experts",
    )
    yield (
        architecture.expert_ffn_hidden_size % parallel.expert_tensor != 0,
        "parallel.expert_tensor",
        f"{parallel.expert_tensor} must divide an expert's width {architecture.expert_ffn_hidden_size}",
    )
    yield (
        parallel.tensor > 1 and not parallel.sequence,
        "parallel.sequence",
        "a mixture of experts under tensor parallelism needs sequence: true",
    )
    allowed = supported_dispatchers(device, parallel.expert_tensor)
    yield (
        experts.dispatcher not in allowed,
        "experts.dispatcher",
        f"{experts.dispatcher} does not run here: choose of {', '.join(sorted(allowed))}",
    )
    yield (
        experts.deepep and (device == "cpu" or experts.dispatcher != "flex"),
        "experts.deepep",
        "DeepEP needs GPUs and experts.dispatcher: flex",
    )
