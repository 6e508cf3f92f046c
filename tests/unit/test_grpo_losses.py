"""GRPO's arithmetic against plain references, both in float64: log-probs, and every loss however packed."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from milepost.configuration import schema
from milepost.grpo.advantages import ADVANTAGES
from milepost.grpo.aggregations import AGGREGATIONS, StepTotals
from milepost.grpo.corrections import CORRECTIONS
from milepost.grpo.log_probs import token_log_probs
from milepost.grpo.losses import KL_ESTIMATES, POLICY_LOSSES, TokenBatch, grpo_loss, low_variance_kl
from milepost.grpo.packing import pack_sequences
from milepost.grpo.responses import Responses
from precision import assert_as_precise
from settings import algorithm

pytestmark = pytest.mark.numerical

VOCABULARY, HIDDEN = 37, 16


@pytest.mark.parametrize(
    ("functions", "names"),
    [
        (ADVANTAGES, schema.Advantage),
        (POLICY_LOSSES, schema.PolicyLoss),
        (KL_ESTIMATES, schema.KlType),
        (AGGREGATIONS, schema.Aggregation),
        ({"none", *CORRECTIONS}, schema.Correction),
    ],
)
def test_every_name_that_the_configuration_allows_is_a_function_and_no_other(functions, names):
    assert set(functions) == set(get_args(names))


@pytest.mark.parametrize("key", ["advantage", "loss", "kl_type", "loss_aggregation", "correction"])
def test_another_name_is_refused_with_those_that_there_are(key):
    with pytest.raises(ValueError, match=f"{key}\n  Input should be '"):
        algorithm(**{key: "sum"})


def responses(*lengths):
    """Whole responses of these lengths, on one rank."""
    return Responses(torch.tensor(lengths), torch.tensor(lengths))


def policy(seed=0, positions=23):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCABULARY, (positions,), generator=generator)
    return hidden, weight, targets


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 23, 1000])
def test_chunked_log_probs_and_entropy_equal_the_full_softmax_with_their_gradients(chunk, temperature):
    hidden, weight, targets = policy()
    up_log_probs, up_entropy = torch.randn(2, 23, dtype=torch.float64)
    log_probs, entropy = token_log_probs(
        hidden, weight, targets, temperature=temperature, chunk=chunk, with_entropy=True
    )
    gradients = torch.autograd.grad((log_probs * up_log_probs + entropy * up_entropy).sum(), (hidden, weight))

    full = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    expected_log_probs = full.gather(1, targets[:, None])[:, 0]
    expected_entropy = -(full.exp() * full).sum(-1)
    expected = torch.autograd.grad(
        (expected_log_probs * up_log_probs + expected_entropy * up_entropy).sum(), (hidden, weight)
    )
    torch.testing.assert_close(log_probs, expected_log_probs)
    torch.testing.assert_close(entropy, expected_entropy)
    torch.testing.assert_close(gradients, expected)


def test_log_probs_alone_have_the_same_gradients_and_need_no_entropy():
    hidden, weight, targets = policy(1)
    up = torch.randn(23, dtype=torch.float64)
    log_probs, entropy = token_log_probs(hidden, weight, targets, temperature=0.7, chunk=5)
    gradients = torch.autograd.grad((log_probs * up).sum(), (hidden, weight))
    full = torch.log_softmax(hidden @ weight.T / 0.7, dim=-1).gather(1, targets[:, None])[:, 0]
    assert entropy is None
    torch.testing.assert_close(gradients, torch.autograd.grad((full * up).sum(), (hidden, weight)))


def test_log_probs_of_a_bf16_model_are_not_rounded_to_bf16():
    hidden, weight, targets = policy(2)
    hidden, weight = (8 * hidden).bfloat16().detach(), weight.bfloat16().detach()
    log_probs, _ = token_log_probs(hidden, weight, targets, temperature=1.0, chunk=7)
    reference, exact = (
        torch.log_softmax(hidden.to(dtype) @ weight.to(dtype).T, -1).gather(1, targets[:, None])[:, 0]
        for dtype in (torch.float32, torch.float64)
    )
    assert log_probs.dtype == torch.float32
    assert_as_precise(log_probs, reference, exact)


def test_log_probs_survive_logits_far_beyond_the_range_of_exp():
    hidden, weight, targets = policy(3)
    log_probs, entropy = token_log_probs(
        1e3 * hidden.float(), weight.float(), targets, temperature=1.0, chunk=8, with_entropy=True
    )
    (log_probs.sum() + entropy.sum()).backward()
    assert torch.isfinite(log_probs).all() and torch.isfinite(entropy).all() and torch.isfinite(hidden.grad).all()


def test_low_variance_kl_is_exact_in_expectation_and_never_negative():
    """As long as no token reaches the estimate's bound."""
    logits = 0.3 * torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    policy_log, reference_log = torch.log_softmax(logits, -1).unbind()
    estimate = low_variance_kl(policy_log, reference_log)
    assert (estimate >= 0).all()
    exact = (policy_log.exp() * (policy_log - reference_log)).sum()
    torch.testing.assert_close((policy_log.exp() * estimate).sum(), exact)


def test_a_token_that_the_policy_gave_up_does_not_outweigh_all_others():
    """With a log ratio of 19 the estimate is 1.8e8, and beyond 88 infinite in fp32."""
    log_probs = torch.tensor([-19.0, -100.0, 0.0, -1.0], requires_grad=True)
    estimate = low_variance_kl(log_probs, torch.tensor([0.0, 0.0, -100.0, -0.5]))
    assert estimate[:3].tolist() == [10.0] * 3
    (gradient,) = torch.autograd.grad(estimate.sum(), log_probs)
    assert torch.isfinite(gradient).all()
    plain = torch.tensor(-1.0, requires_grad=True)
    unbounded = torch.exp(-0.5 - plain) - (-0.5 - plain) - 1.0
    assert torch.equal(estimate[3], unbounded)  # bit for bit what it is without the bounds
    assert torch.equal(gradient[3], torch.autograd.grad(unbounded, plain)[0])


@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [100.0, -200.0])
def test_a_ratio_beyond_the_range_of_exp_leaves_loss_and_gradient_finite(advantage, log_ratio):
    log_probs = torch.tensor([log_ratio - 300.0], requires_grad=True)
    batch = TokenBatch(
        weights=torch.ones(1),
        advantages=torch.tensor([advantage]),
        rollout_log_probs=log_probs.detach(),
        responses=responses(1),
        old_log_probs=torch.tensor([-300.0]),
        reference_log_probs=torch.tensor([-1.0]),
    )
    loss, metrics = grpo_loss(log_probs, None, batch, algorithm(kl_coefficient=0.1))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(log_probs.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())


def reference_loss(sequences, settings):
    """The losses written out answer by answer and token by token, as the papers state them."""
    total, tokens = 0.0, sum(len(s["log_probs"]) for s in sequences)
    for s in sequences:
        length, advantage = len(s["log_probs"]), s["advantage"]
        surrogates = [surrogate(torch.exp(x), advantage, settings) for x in s["log_probs"] - s["old"]]
        if settings.loss == "gspo":  # one ratio for the whole answer: the geometric mean
            ratio = torch.exp((s["log_probs"] - s["old"]).sum() / length)
            surrogates = [surrogate(ratio, advantage, settings)] * length
        elif settings.loss == "cispo":
            ratios = [min(math.exp(x), 1 + settings.clip_high) for x in (s["log_probs"] - s["old"]).tolist()]
            surrogates = [r * advantage * x for r, x in zip(ratios, s["log_probs"], strict=True)]
        response = 0.0
        for t, weight in enumerate(reference_weights((s["old"] - s["rollout"]).tolist(), settings)):
            log_ratio = s["reference"][t] - s["log_probs"][t]
            kl = torch.exp(log_ratio) - log_ratio - 1
            response = response - weight * surrogates[t] + settings.kl_coefficient * kl
            response = response - settings.entropy_coefficient * s["entropy"][t]
        if settings.loss_aggregation == "token_mean":
            total = total + response / tokens
        else:
            constant = settings.loss_aggregation == "constant_length"
            total = total + response / (settings.constant_length if constant else length) / len(sequences)
    return total


def surrogate(ratio, advantage, settings):
    """What PPO maximises, at one ratio; with ``dual_clip`` at least ``dual_clip * advantage`` if that is negative."""
    held = min(max(ratio.item(), 1 - settings.clip), 1 + settings.clip_high)
    best = ratio * advantage if ratio.item() * advantage <= held * advantage else ratio.new_tensor(held * advantage)
    if settings.dual_clip and advantage < 0 and best.item() < settings.dual_clip * advantage:
        return ratio.new_tensor(settings.dual_clip * advantage)
    return best


def reference_weights(log_ratios, settings):
    """The importance weight of each token of one answer, from log pi0 - log mu."""
    level, _, kind = settings.correction.partition("_")
    if level == "none":
        return [1.0] * len(log_ratios)
    low, high = settings.correction_bounds
    found = []
    for x in log_ratios:
        rho = math.exp(sum(log_ratios) if level == "sequence" else x)
        found.append(min(max(rho, low), high) if kind == "truncate" else rho if low <= rho <= high else 0.0)
    return found


def make_sequences(lengths, hidden, weight):
    """Sequences whose log-probs depend on (hidden, weight), with ratios on both sides of all clips."""
    generator = torch.Generator().manual_seed(5)
    full = torch.log_softmax(hidden @ weight.T, -1)
    entropy = -(full.exp() * full).sum(-1)
    targets = torch.randint(VOCABULARY, (sum(lengths),), generator=generator)
    log_probs = full.gather(1, targets[:, None])[:, 0]
    sequences, start = [], 0
    for index, length in enumerate(lengths):
        span = slice(start, start + length)
        noise = 0.5 * torch.randn(3, length, generator=generator, dtype=torch.float64)
        sequences.append(
            {
                "span": span,
                "log_probs": log_probs[span],
                "entropy": entropy[span],
                "old": log_probs[span].detach() + noise[0],
                "reference": log_probs[span].detach() + noise[1],
                "rollout": log_probs[span].detach() + noise[0] + noise[2],
                "advantage": (-1.0) ** index * (0.5 + index),
            }
        )
        start += length
    return sequences, targets


ALGORITHMS = [
    {},
    {"dual_clip": 1.4},
    {"advantage": "dr_grpo", "loss_aggregation": "constant_length", "constant_length": 11},
    {"loss_aggregation": "token_mean"},
    {"loss": "gspo", "clip": 0.1, "clip_high": 0.15},
    {"loss": "gspo", "correction": "sequence_mask", "correction_bounds": [0.3, 3.0]},
    {"loss": "cispo", "loss_aggregation": "token_mean"},
    {"loss": "cispo", "correction": "token_mask", "correction_bounds": [0.5, 2.0]},
    {"correction": "token_truncate", "correction_bounds": [0.0, 1.5]},
    {"correction": "sequence_truncate", "correction_bounds": [0.2, 4.0], "loss_aggregation": "token_mean"},
]


@pytest.mark.parametrize("changes", ALGORITHMS, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    budget=st.integers(1, 30),
    ranks=st.integers(1, 3),
)
def test_loss_and_gradient_are_the_papers_and_no_packing_changes_them(changes, lengths, budget, ranks):
    settings = algorithm(kl_coefficient=0.1, entropy_coefficient=0.01, **changes)
    hidden, weight, _ = policy(4, sum(lengths))
    sequences, targets = make_sequences(lengths, hidden, weight)
    expected = reference_loss(sequences, settings)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    totals = StepTotals(len(lengths), sum(lengths), settings.constant_length)

    total, gradients = 0.0, [torch.zeros_like(hidden), torch.zeros_like(weight)]
    for pack in (pack for packs in pack_sequences(lengths, budget, ranks) for pack in packs if pack):
        span = torch.cat([torch.arange(sequences[i]["span"].start, sequences[i]["span"].stop) for i in pack])
        log_probs, entropy = token_log_probs(
            hidden[span], weight, targets[span], temperature=1.0, chunk=4, with_entropy=True
        )
        weights = [AGGREGATIONS[settings.loss_aggregation](lengths[i], totals) for i in pack]
        per_token = torch.tensor([lengths[i] for i in pack])
        batch = TokenBatch(
            weights=torch.tensor(weights, dtype=torch.float64).repeat_interleave(per_token),
            advantages=torch.tensor([sequences[i]["advantage"] for i in pack]).double().repeat_interleave(per_token),
            rollout_log_probs=torch.cat([sequences[i]["rollout"] for i in pack]),
            responses=responses(*per_token.tolist()),
            old_log_probs=torch.cat([sequences[i]["old"] for i in pack]),
            reference_log_probs=torch.cat([sequences[i]["reference"] for i in pack]),
        )
        loss, _ = grpo_loss(log_probs, entropy, batch, settings)
        total += loss.item()
        for accumulated, new in zip(gradients, torch.autograd.grad(loss, (hidden, weight)), strict=True):
            accumulated += new
    assert total == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(gradients, list(expected_gradients))


def one_token(ratio, advantage, **changes):
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(
        weights=torch.ones(1),
        advantages=torch.tensor([advantage]),
        rollout_log_probs=torch.zeros(1),
        responses=responses(1),
        old_log_probs=torch.zeros(1),
    )
    loss, metrics = grpo_loss(log_prob, None, batch, algorithm(**changes))
    return loss.item(), torch.autograd.grad(loss, log_prob)[0].item(), metrics["clip_fraction"].item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.27, 1.0, -1.27, 0.0),
        (1.30, 1.0, -1.28, 1.0),  # the upper clip is 0.28, not 0.2
        (0.75, 1.0, -0.75, 0.0),  # a good token that grew rarer is always pushed back up
        (0.75, -1.0, 0.80, 1.0),
        (0.81, -1.0, 0.81, 0.0),
        (1.50, -1.0, 1.50, 0.0),
    ],
)
def test_the_ratio_is_clipped_only_in_the_direction_of_the_advantage(ratio, advantage, loss, clipped):
    value, gradient, fraction = one_token(ratio, advantage)
    assert value == pytest.approx(loss)
    assert gradient == (0.0 if clipped else pytest.approx(-advantage * ratio))
    assert fraction == clipped


def test_the_dual_clip_bounds_what_a_bad_token_can_lose():
    assert one_token(2.9, -1.0, dual_clip=3.0) == (pytest.approx(2.9), pytest.approx(2.9), 0.0)
    assert one_token(50.0, -1.0, dual_clip=3.0) == (pytest.approx(3.0), 0.0, 1.0)
    assert one_token(50.0, 1.0, dual_clip=3.0) == one_token(50.0, 1.0)


def test_cispo_bounds_the_weight_of_a_token_and_keeps_its_gradient():
    """PPO has none beyond the clip; and there is no lower bound."""
    for ratio, weight, clipped in ((1.27, 1.27, 0.0), (5.0, 1.28, 1.0), (0.1, 0.1, 0.0)):
        for advantage in (1.0, -1.0):
            _, gradient, fraction = one_token(ratio, advantage, loss="cispo")
            assert gradient == pytest.approx(-weight * advantage) and fraction == clipped


def step(old=False, dtype=torch.float64):
    """Log-probs of two responses, and what else their loss needs."""
    generator = torch.Generator().manual_seed(0)
    log_probs, noise, drift, advantages = torch.randn(4, 12, generator=generator, dtype=dtype)
    log_probs, lengths = log_probs - 3, (5, 7)
    batch = TokenBatch(
        weights=torch.tensor([1 / (2 * length) for length in lengths], dtype=dtype).repeat_interleave(
            torch.tensor(lengths)
        ),
        advantages=advantages,
        rollout_log_probs=log_probs + 0.1 * noise,
        responses=responses(*lengths),
        old_log_probs=log_probs + 0.3 * drift if old else None,
    )
    return log_probs.requires_grad_(), batch


@pytest.mark.parametrize("old", [False, True])
def test_the_recipes_loss_is_the_plain_formula_bit_for_bit(old):
    """Whatever else can be switched on leaves no trace where it is off."""
    log_probs, batch = step(old, torch.float32)
    loss, _ = grpo_loss(log_probs, None, batch, algorithm())
    (gradient,) = torch.autograd.grad(loss, log_probs)
    log_ratio = log_probs - (batch.old_log_probs if old else log_probs.detach())
    ratio = log_ratio.clamp(-20, 20).exp()
    free, clipped = -batch.advantages * ratio, -batch.advantages * ratio.clamp(0.8, 1.28)
    plain = (batch.weights * torch.maximum(free, clipped)).sum()
    assert torch.equal(loss, plain) and torch.equal(gradient, torch.autograd.grad(plain, log_probs)[0])


@pytest.mark.parametrize("changes", [{}, {"dual_clip": 3.0}, {"loss": "gspo"}, {"loss": "cispo"}])
def test_one_step_on_fresh_data_has_the_same_gradient_under_every_loss_and_clips_nothing(changes):
    log_probs, batch = step()
    loss, metrics = grpo_loss(log_probs, None, batch, algorithm(**changes))
    torch.testing.assert_close(torch.autograd.grad(loss, log_probs)[0], -batch.weights * batch.advantages)
    assert metrics["clip_fraction"] == 0 and metrics["ratio"] / metrics["weight"] == pytest.approx(1.0)
    assert metrics["log_prob_diff"] > 0


def test_against_the_engine_the_ratio_is_taken_to_what_the_engine_sampled_with():
    log_probs, batch = step()
    settings = algorithm(clip=0.05, clip_high=0.05)
    loss, metrics = grpo_loss(log_probs, None, batch, settings, against_engine=True)
    sampled = replace(batch, old_log_probs=batch.rollout_log_probs)
    assert torch.equal(loss, grpo_loss(log_probs, None, sampled, settings)[0])
    assert 0 < metrics["clip_fraction"] < metrics["weight"]
    apart = (batch.weights * (log_probs.detach() - batch.rollout_log_probs).abs()).sum()
    torch.testing.assert_close(metrics["log_prob_diff"], apart)  # still between trainer and engine
