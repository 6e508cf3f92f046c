"""One of several processes: compare the model under several parallel layouts with a single process's results.

Both compute in float64, and may differ by a single process's fp32 rounding error, scaled to float64's precision.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor, nn

import qwen3_5_reference as reference
from milepost.configuration.schema import Experts, Parallel
from milepost.grpo.partial_gradients import sum_partial_gradients
from milepost.qwen3_5.build import build_model, initialize
from milepost.qwen3_5.model import hidden_states, output_weight
from milepost.qwen3_5.mtp import mtp_loss
from milepost.qwen3_5.packed import context_shard, pack
from precision import allowed_errors, computing_in, in_float64, kind_of
from settings import section

# Four processes in every layout; those that the dense dimensions don't use are data parallel.
LAYOUTS = {
    "dense": [
        (Parallel(), section("experts")),
        (Parallel(tensor=2), section("experts")),
        (Parallel(tensor=2, sequence=False), section("experts")),
        (Parallel(tensor=4), section("experts")),
        (Parallel(context=2), section("experts")),
        (Parallel(context=4), section("experts")),
        (Parallel(tensor=2, context=2), section("experts")),
        (Parallel(pipeline=2), section("experts")),
        (Parallel(tensor=2, pipeline=2), section("experts")),
    ],
    "moe": [
        (Parallel(expert=2), section("experts", dispatcher="flex")),
        (Parallel(expert=4), section("experts", dispatcher="allgather")),
        (Parallel(expert=4), section("experts", dispatcher="alltoall")),
        (Parallel(expert=4), section("experts", dispatcher="flex")),
        (Parallel(tensor=2), section("experts", dispatcher="alltoall")),
        (Parallel(tensor=2, expert=4), section("experts", dispatcher="flex")),
        (Parallel(tensor=2, expert=2, expert_tensor=2), section("experts", dispatcher="allgather")),
        (Parallel(tensor=2, expert=2, expert_tensor=2), section("experts", dispatcher="flex")),
        (Parallel(context=2, expert=2), section("experts", dispatcher="flex")),
        (Parallel(pipeline=2, expert=2), section("experts", dispatcher="alltoall")),
    ],
}
VOCABULARY = 128
# Small, with enough heads to split four ways; under context parallelism two key heads serve four ranks.
SMALL = {"hidden_size": 64, "vocab_size": VOCABULARY, "num_attention_heads": 8, "num_key_value_heads": 4} | {
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
CHANGES = {
    "dense": SMALL | {"intermediate_size": 96},
    "moe": SMALL | {"num_key_value_heads": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}
LENGTHS = [(70, 33, 1, 66), (128, 3), (40, 41, 42), (5, 90)]  # four packs of different lengths


class Batch(NamedTuple):
    """A pack, and a direction for its logits: the loss is their product, so that every logit contributes."""

    ids: Tensor
    positions: Tensor
    packed: object
    responses: Tensor
    direction: Tensor  # (T, V)


def batch(number: int, parallel: Parallel) -> Batch:
    torch.manual_seed(100 + number)
    rows = [torch.randint(0, VOCABULARY, (length,)) for length in LENGTHS[number]]
    real = sum(LENGTHS[number])
    ids, positions, packed = pack(rows, multiple_of=parallel.tensor * parallel.context)
    direction = torch.zeros(ids.shape[1], VOCABULARY)
    direction[:real] = torch.randn(real, VOCABULARY)
    responses = torch.zeros(ids.shape, dtype=torch.bool)
    responses[:, :real] = torch.rand(real) < 0.7
    return Batch(ids, positions, packed, responses, direction)


def loss_and_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """On the last pipeline stage: this rank's part of the loss, and its logits (T / cp, V / tp)."""
    hidden = hidden_states(model, context_shard(batch.ids), context_shard(batch.positions), batch.packed)
    if not parallel_state.is_pipeline_last_stage():
        return hidden, hidden
    whole = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    logits = whole @ output_weight(model).T
    direction = context_shard(batch.direction.to(logits), 0).chunk(
        parallel_state.get_tensor_model_parallel_world_size(), 1
    )
    loss = (logits * direction[parallel_state.get_tensor_model_parallel_rank()]).sum()
    if model.config.mtp_num_layers:
        loss = loss + 0.2 * mtp_loss(model, hidden, batch.ids, batch.responses, batch.packed, token_count=1)
    return loss, logits


def forward_and_backward(model: nn.Module, batch: Batch) -> Tensor:
    """One pack through all pipeline stages and back; the logits, on the last stage."""
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    received = None
    if not first:
        shards = parallel_state.get_context_parallel_world_size()
        if model.config.sequence_parallel:
            shards *= parallel_state.get_tensor_model_parallel_world_size()
        received = torch.empty(
            batch.ids.shape[1] // shards, 1, model.config.hidden_size, dtype=model.config.params_dtype
        )
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(received.requires_grad_())
    output, logits = loss_and_logits(model, batch)
    if last:
        output.backward()
    else:
        gradient = torch.empty_like(output)
        dist.send(output.detach().contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        dist.recv(gradient, parallel_state.get_pipeline_model_parallel_next_rank())
        output.backward(gradient)
    if not first:
        dist.send(received.grad, parallel_state.get_pipeline_model_parallel_prev_rank())
    return logits.detach()


def reduce_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every rank's gradients, summed over the ranks that hold the same weights."""
    parameters = dict(model.named_parameters())
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in parameters.items()}
    sum_partial_gradients(parameters, gradients)
    for name, gradient in gradients.items():
        if getattr(parameters[name], "allreduce", True):
            dist.all_reduce(gradient, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        else:
            dist.all_reduce(gradient, group=parallel_state.get_expert_data_parallel_group())
    for name, parameter in parameters.items():
        if getattr(parameter, "shared_embedding", False):  # the first and the last stage each have a copy
            dist.all_reduce(gradients[name], group=parallel_state.get_embedding_group())
    return gradients


def places() -> reference.Places:
    return reference.Places(
        (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
        (parallel_state.get_expert_model_parallel_rank(), parallel_state.get_expert_model_parallel_world_size()),
        (parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()),
    )


def assert_near(found: Tensor, expected: Tensor, allowed: float, what: str) -> None:
    error = (found - expected).norm().item()
    assert error <= allowed, f"{what}: off by {error:.3g} of {expected.norm():.3g}, allowed {allowed:.3g}"


def check(architecture, parallel: Parallel, experts: Experts, expected: dict) -> None:
    """Logits and every gradient of this rank against its share of the single process's."""
    # With a tied embedding on two stages, the MTP layer would add a third copy, which is not supported.
    with_mtp = parallel.pipeline == 1 or not architecture.tie_embeddings
    allowed, packs = expected["allowed"], [batch(number, parallel) for number in range(len(LENGTHS))]
    with in_float64():
        model = build_model(architecture, parallel, dtype=torch.float64, experts=experts, mtp_num_layers=int(with_mtp))
        first_layer = parallel_state.get_pipeline_model_parallel_rank() * len(model.decoder.layers)
        reference.load(model, expected["weights"], architecture, places(), first_layer)
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        for number in range(rank, len(LENGTHS), ranks):
            logits = forward_and_backward(model, packs[number])
            if parallel_state.is_pipeline_last_stage():
                mine = torch.zeros(parallel.context * len(logits), VOCABULARY)
                mine[: sum(LENGTHS[number])] = expected["logits"][number]
                mine = reference._cut(context_shard(mine, 0), 1, places().tensor)
                real = context_shard(packs[number].direction, 0).any(1)
                assert_near(logits[real], mine[real], allowed["logits"], f"logits of pack {number}")
        for name, gradient in reduce_gradients(model).items():
            whole = reference.whole_name(name, first_layer)
            share = reference.shard(name, expected["gradients"][whole], architecture, places())
            assert_near(gradient, share, allowed[kind_of(whole)], name)


def single_process(kind: str, file: Path) -> None:
    """Weights, logits and gradients of the whole model on all packs, as the reference."""
    architecture, theirs = reference.reference(kind, **CHANGES[kind])
    weights = reference.megatron_names(architecture, dict(theirs.named_parameters()))
    weights |= reference.mtp_names(weights)
    packs = [batch(number, Parallel()) for number in range(len(LENGTHS))]

    def logits_and_gradients(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        with computing_in(dtype):
            model = build_model(architecture, dtype=dtype, mtp_num_layers=1)
            reference.load(model, weights, architecture)
            logits = [forward_and_backward(model, of_pack) for of_pack in packs]
        return logits, {name: parameter.grad for name, parameter in model.named_parameters()}

    rounded, exact = logits_and_gradients(torch.float32), logits_and_gradients(torch.float64)
    allowed = allowed_errors(
        *({"logits": torch.cat(logits)} | gradients for logits, gradients in (rounded, exact)), torch.float64
    )
    logits, gradients = exact
    # If several stages need the embedding or the output weight, its copies have different names.
    for tree in (weights, gradients, allowed):
        tree.setdefault("output_layer.weight", tree["embedding.word_embeddings.weight"])
    torch.save({"weights": weights, "logits": logits, "gradients": gradients, "allowed": allowed}, file)


def main(folder: Path) -> None:
    for kind, layouts in LAYOUTS.items():
        architecture, _ = reference.reference(kind, **CHANGES[kind])
        expected = torch.load(folder / f"{kind}.pt")
        for parallel, experts in layouts:
            initialize(parallel)
            try:
                check(architecture, parallel, experts, expected)
            except Exception as error:
                raise AssertionError(f"{kind}, {parallel} {experts} on rank {dist.get_rank()}: {error}") from error
            parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
