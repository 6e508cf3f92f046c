"""The CPU kernels against plain references, in fp32 and in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from milepost.qwen3_5 import kernels
from milepost.qwen3_5.packed import pack, shift_left
from precision import assert_as_precise

pytestmark = pytest.mark.numerical

LENGTHS = {
    "short": [5, 1, 8, 3],
    "one chunk each": [50, 64, 33, 7],
    "many chunks": [200, 1, 64, 65, 129, 30],
    "alone": [150],
}


@pytest.fixture(params=LENGTHS)
def lengths(request) -> list[int]:
    return LENGTHS[request.param]


def pack_of(lengths: list[int]):
    return pack([torch.zeros(length, dtype=torch.long) for length in lengths])[2]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def delta_rule_inputs(tokens: int) -> list[Tensor]:
    """q, k (T, 2, 6), v (T, 4, 5), decay and beta (T, 4)"""
    torch.manual_seed(1)
    decay = (-(torch.rand(tokens, 4, dtype=torch.float64) ** 3) * 4).requires_grad_()
    beta = torch.rand(tokens, 4, dtype=torch.float64, requires_grad=True)
    return [random(tokens, 2, 6), random(tokens, 2, 6), random(tokens, 4, 5), decay, beta]


def delta_rule_step_by_step(query, key, value, decay, beta) -> Tensor:
    """The recurrence by its definition, for one sequence, token by token."""
    query, key = ((x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(2, 1) for x in (query, key))
    state = value.new_zeros(value.shape[1], key.shape[2], value.shape[2])  # (H, Dk, Dv)
    outputs = []
    for q, k, v, log_fade, b in zip(query, key, value, decay, beta, strict=True):
        state = state * log_fade.exp()[:, None, None]
        correction = (v - torch.einsum("hkv,hk->hv", state, k)) * b[:, None]
        state = state + k[:, :, None] * correction[:, None, :]
        outputs.append(torch.einsum("hkv,hk->hv", state, q) * key.shape[2] ** -0.5)
    return torch.stack(outputs)


def transformers_delta_rule(query, key, value, decay, beta) -> Tensor:
    """Chunked, like ours, since it rounds differently from token by token: gates are differences of long sums."""
    query, key = (x.repeat_interleave(2, 1) for x in (query, key))
    batch = (x[None] for x in (query, key, value, decay, beta))
    return torch_chunk_gated_delta_rule(*batch, use_qk_l2norm_in_kernel=True)[0][0]


def convolution_step_by_step(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    return F.silu(torch.stack([(padded[t : t + weight.shape[1]] * weight.T).sum(0) for t in range(len(x))]))


def attention_plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), value)


def assert_same_values_and_gradients(packed_function, one_sequence, inputs, shared, lengths, in_fp32=None):
    """Compare a function of a whole pack with one that is called for each of its sequences.

    Args:
        in_fp32: another such function, whose rounding error bounds ours; by default the same one.
    """

    def sequence_by_sequence(function):
        def of_pack(*leaves):
            of_sequences = zip(*(x.split(lengths) for x in leaves[: len(inputs)]), strict=True)
            return torch.cat([function(*parts, *leaves[len(inputs) :]) for parts in of_sequences])

        return of_pack

    def output_and_gradients(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*inputs, *shared)]
        output = function(*leaves)
        gradients = torch.autograd.grad(output, leaves, direction.to(dtype))
        return {str(number): tensor for number, tensor in enumerate((output, *gradients))}

    direction = torch.randn_like(packed_function(*inputs, *shared))
    reference = output_and_gradients(sequence_by_sequence(in_fp32 or one_sequence), torch.float32)
    exact = output_and_gradients(sequence_by_sequence(one_sequence), torch.float64)
    for dtype in (torch.float32, torch.float64):
        assert_as_precise(output_and_gradients(packed_function, dtype), reference, exact)


def test_delta_rule_equals_its_recurrence(lengths):
    packed = pack_of(lengths)
    assert_same_values_and_gradients(
        lambda *inputs: kernels.gated_delta_rule(*inputs, packed),
        delta_rule_step_by_step,
        delta_rule_inputs(sum(lengths)),
        [],
        lengths,
        in_fp32=transformers_delta_rule,
    )


def test_convolution_equals_its_sum(lengths):
    packed = pack_of(lengths)
    assert_same_values_and_gradients(
        lambda x, weight: kernels.causal_convolution(x, weight, packed),
        convolution_step_by_step,
        [random(sum(lengths), 6)],
        [random(6, 4)],
        lengths,
    )


def test_attention_equals_its_softmax(lengths):
    packed, tokens = pack_of(lengths), sum(lengths)
    assert_same_values_and_gradients(
        lambda *inputs: kernels.causal_attention(*inputs, packed),
        attention_plain,
        [random(tokens, 4, 8), random(tokens, 2, 8), random(tokens, 2, 8)],
        [],
        lengths,
    )


@pytest.mark.parametrize("kernel", ["delta rule", "convolution", "attention"])
def test_no_sequence_sees_another_bit_for_bit(kernel, lengths):
    torch.manual_seed(2)
    packed, tokens = pack_of([*lengths, 40]), sum(lengths) + 40

    def run(inputs):
        if kernel == "delta rule":
            return kernels.gated_delta_rule(*inputs, packed)
        return (kernels.causal_convolution if kernel == "convolution" else kernels.causal_attention)(*inputs, packed)

    if kernel == "delta rule":
        inputs = delta_rule_inputs(tokens)
    elif kernel == "convolution":
        inputs = [random(tokens, 6), random(6, 4)]
    else:
        inputs = [random(tokens, 4, 8), random(tokens, 2, 8), random(tokens, 2, 8)]
    first = lengths[0]
    others = [x if len(x) != tokens else torch.cat([x[:first], x[first:] * -3]) for x in inputs]
    assert torch.equal(run(inputs)[:first], run(others)[:first])
    earlier = [x if len(x) != tokens else torch.cat([x[:-40] * 2, x[-40:]]) for x in inputs]
    assert torch.equal(run(inputs)[-40:], run(earlier)[-40:])


def test_strong_decay_keeps_values_and_gradients_finite():
    inputs = [x.detach().float().requires_grad_() for x in delta_rule_inputs(150)]
    inputs[3] = torch.full((150, 4), -40.0, requires_grad=True)
    output = kernels.gated_delta_rule(*inputs, pack_of([150]))
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), inputs))


def test_shifting_left_stops_at_the_end_of_each_sequence():
    ids, _, packed = pack([[1, 2, 3], [4], [5, 6]])
    assert shift_left(ids, packed).tolist() == [[2, 3, 0, 0, 6, 0]]
    assert shift_left(ids, packed, 2).tolist() == [[3, 0, 0, 0, 0, 0]]


def test_equal_prefixes_share_their_rows():
    sequences = [[1, 2, 3], [1, 2, 4, 5], [1, 3], [1, 2, 6]]
    ids, positions, packed = pack(sequences, prefixes=[2, 2, 1, 2], multiple_of=4, padding_id=9)
    assert ids.tolist() == [[1, 2, 3, 4, 5, 1, 3, 6]]
    assert positions.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2]]
    assert packed.spread(ids[0]).tolist() == [token for sequence in sequences for token in sequence]
    assert packed.lengths == (3, 4, 2, 3)
    ids, _, packed = pack(sequences, prefixes=[2, 2, 1, 2], multiple_of=6, padding_id=9)
    assert ids.tolist() == [[1, 2, 3, 4, 5, 1, 3, 6, 9, 9, 9, 9]] and packed.lengths[-1] == 4
    assert pack([[1, *range(30)], [1, *range(30)]], prefixes=[1, 1])[2].row_of_token is None
    with pytest.raises(ValueError, match="leaves nothing"):
        pack(sequences, prefixes=[3, 2, 1, 2])


def test_padding_a_pack_adds_a_sequence_of_its_own():
    ids, positions, packed = pack([[1, 2, 3], [4]], multiple_of=8, padding_id=9)
    assert ids.tolist() == [[1, 2, 3, 4, 9, 9, 9, 9]]
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert packed.cu_seqlens_q.tolist() == [0, 3, 4, 8]
    assert packed.max_seqlen_q == 4
