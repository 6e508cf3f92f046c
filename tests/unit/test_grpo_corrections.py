"""Importance weights between engine and trainer: unbiased where they are not bounded, and never differentiated."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from milepost.grpo.learner import _summary
from milepost.grpo.losses import TokenBatch, grpo_loss
from milepost.grpo.responses import Responses
from settings import algorithm

pytestmark = pytest.mark.numerical

VOCABULARY, LENGTH, END = 3, 4, 0
F64 = torch.float64


def every_response():
    """All responses that end with `END`, or at `LENGTH` tokens."""
    for length in range(1, LENGTH + 1):
        for start in itertools.product(range(1, VOCABULARY), repeat=length - 1):
            yield (*start, END)
    yield from itertools.product(range(1, VOCABULARY), repeat=LENGTH)


def token_log_probs(logits, response):
    """Of each token, given the one before it: ``logits`` is (V + 1, V), its last row for the first token."""
    before = [VOCABULARY, *response[:-1]]
    return torch.log_softmax(logits, -1)[before, list(response)]


def policies():
    """The logits of the trainer's policy, with gradient, and of an engine that computes something else."""
    generator = torch.Generator().manual_seed(0)
    trainer, apart = torch.randn(2, VOCABULARY + 1, VOCABULARY, generator=generator, dtype=F64)
    return trainer.requires_grad_(), (trainer + 0.5 * apart).detach()


def reward(response):
    return math.sin(7.0 * sum(token * 3**place for place, token in enumerate(response)))


def expected_gradient(**changes):
    """The gradient of the loss in expectation over what the engine samples, and the true policy gradient."""
    trainer, engine = policies()
    responses = list(every_response())
    log_probs = torch.cat([token_log_probs(trainer, response) for response in responses])
    of_engine = [token_log_probs(engine, response) for response in responses]
    lengths = torch.tensor([len(response) for response in responses])
    probabilities = torch.stack([found.sum().exp() for found in of_engine])
    torch.testing.assert_close(probabilities.sum().item(), 1.0)
    batch = TokenBatch(
        weights=probabilities.repeat_interleave(lengths),
        advantages=torch.tensor([reward(response) for response in responses], dtype=F64).repeat_interleave(lengths),
        rollout_log_probs=torch.cat(of_engine),
        responses=Responses(lengths, lengths),
    )
    loss, _ = grpo_loss(log_probs, None, batch, algorithm(**changes))
    (found,) = torch.autograd.grad(loss, trainer, retain_graph=True)
    value = sum(token_log_probs(trainer, response).sum().exp() * reward(response) for response in responses)
    return -found, torch.autograd.grad(value, trainer)[0]


@pytest.mark.parametrize("correction", ["sequence_truncate", "sequence_mask"])
def test_unbounded_sequence_weights_give_the_true_gradient(correction):
    found, true = expected_gradient(correction=correction, correction_bounds=[0.0, 1e9])
    assert (found - true).abs().max() < 1e-10


@pytest.mark.parametrize("correction", ["none", "token_truncate"])
def test_without_them_the_gradient_is_biased(correction):
    """Token weights leave the prefix as the engine sampled it."""
    found, true = expected_gradient(correction=correction)
    assert (found - true).abs().max() > 1e-3


def step():
    """Two responses whose importance weights lie below, within and above [0.5, 2], and the log-probs that they hang on.

    The product of the first one's weights is 1.2, that of the second's 0.12.
    """
    lengths = torch.tensor([3, 2])
    importance = torch.tensor([4.0, 0.4, 0.75, 0.2, 0.6], dtype=F64)
    log_probs = torch.linspace(-3, -1, 5, dtype=F64).requires_grad_()
    batch = TokenBatch(
        weights=torch.tensor([0.1, 0.1, 0.1, 0.2, 0.2], dtype=F64),
        advantages=torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0], dtype=F64),
        rollout_log_probs=log_probs.detach() - importance.log(),
        responses=Responses(lengths, lengths),
    )
    return log_probs, batch


WEIGHTS = {
    "token_truncate": [2.0, 0.5, 0.75, 0.5, 0.6],
    "token_mask": [0.0, 0.0, 0.75, 0.0, 0.6],
    "sequence_truncate": [1.2, 1.2, 1.2, 0.5, 0.5],
    "sequence_mask": [1.2, 1.2, 1.2, 0.0, 0.0],
}


def step_gradient(log_probs, batch, settings):
    loss, metrics = grpo_loss(log_probs, None, batch, settings)
    return torch.autograd.grad(loss, log_probs)[0], metrics


@pytest.mark.parametrize("correction", WEIGHTS)
@pytest.mark.parametrize("loss", ["ppo", "cispo"])
def test_the_weights_are_constants_of_the_gradient(loss, correction):
    """Central differences of the loss with its weights frozen, in the log-probs."""
    log_probs, batch = step()
    # A policy within the clip, one step after the weights were worked out.
    batch = replace(batch, old_log_probs=log_probs.detach() - 0.05)
    batch = replace(batch, rollout_log_probs=batch.rollout_log_probs - 0.05)
    found, _ = step_gradient(
        log_probs, batch, algorithm(loss=loss, correction=correction, correction_bounds=[0.5, 2.0])
    )
    ratio = torch.exp(log_probs.detach() - batch.old_log_probs)

    def frozen(values):
        of_policy = torch.exp(values - batch.old_log_probs) if loss == "ppo" else ratio * values
        return -(batch.weights * torch.tensor(WEIGHTS[correction], dtype=F64) * batch.advantages * of_policy).sum()

    width = 1e-6
    for place in range(len(log_probs)):
        up, down = log_probs.detach().clone(), log_probs.detach().clone()
        up[place] += width
        down[place] -= width
        assert found[place].item() == pytest.approx((frozen(up) - frozen(down)).item() / (2 * width), abs=1e-8)


@pytest.mark.parametrize("correction", WEIGHTS)
def test_a_token_outside_the_bounds_changes_no_other_s_gradient(correction):
    """Its weight leaves the numerator alone; means keep their denominators."""
    log_probs, batch = step()
    settings = algorithm(correction=correction, correction_bounds=[0.5, 2.0])
    found, metrics = step_gradient(log_probs, batch, settings)
    plain, _ = step_gradient(log_probs, batch, algorithm())
    torch.testing.assert_close(found, torch.tensor(WEIGHTS[correction], dtype=F64) * plain)
    of_second = batch.rollout_log_probs + torch.tensor([0.0, 0.0, 0.0, 9.0, 9.0])
    other, _ = step_gradient(log_probs, replace(batch, rollout_log_probs=of_second), settings)
    assert torch.equal(found[:3], other[:3])
    bounded = [w != rho for w, rho in zip(WEIGHTS[correction], importance_of(correction), strict=True)]
    assert metrics["importance_clipped_share"].item() == pytest.approx(batch.weights[bounded].sum().item())


def importance_of(correction):
    sequence = correction.startswith("sequence")
    return [1.2, 1.2, 1.2, 0.12, 0.12] if sequence else [4.0, 0.4, 0.75, 0.2, 0.6]


@pytest.mark.parametrize("correction", ["none", "token_mask", "sequence_truncate"])
def test_the_metrics_say_how_far_engine_and_trainer_are_apart(correction):
    log_probs, batch = step()
    _, metrics = step_gradient(log_probs, batch, algorithm(correction=correction))
    report = {name: value.item() for name, value in metrics.items()} | {"learning_rate": 0.0}
    found = _summary([report])
    weights, importance = batch.weights.tolist(), importance_of(correction)
    total = sum(weights)
    mean = sum(w * rho for w, rho in zip(weights, importance, strict=True)) / total
    square = sum(w * rho**2 for w, rho in zip(weights, importance, strict=True)) / total
    assert found["importance_mean"] == pytest.approx(mean)
    assert found["importance_max"] == pytest.approx(max(importance))
    assert found["importance_ess"] == pytest.approx(mean**2 / square)
    of_tokens = importance_of("token")
    k3 = sum(w * (rho - 1 - math.log(rho)) for w, rho in zip(weights, of_tokens, strict=True)) / total
    assert found["engine_kl"] == pytest.approx(k3)
    assert ("importance_clipped_share" in found) == (correction != "none")
    assert "importance_square" not in found


def test_weights_survive_probabilities_that_have_nothing_to_do_with_each_other():
    log_probs = torch.tensor([-300.0, -1.0, -1.0], requires_grad=True)
    lengths = torch.tensor([1, 2])
    batch = TokenBatch(
        weights=torch.ones(3),
        advantages=torch.tensor([0.0, 1.0, 1.0]),
        rollout_log_probs=torch.tensor([-1.0, -200.0, -200.0]),
        responses=Responses(lengths, lengths),
    )
    for correction in WEIGHTS:
        gradient, metrics = step_gradient(log_probs, batch, algorithm(correction=correction))
        assert torch.isfinite(gradient).all() and all(torch.isfinite(value) for value in metrics.values())


def test_sums_and_means_of_responses_reach_every_token():
    lengths = torch.tensor([2, 1, 0, 3])
    values = torch.tensor([1.0, 2.0, 10.0, 1.0, 1.0, 4.0], requires_grad=True)
    responses = Responses(lengths, lengths)
    assert responses.sums(values).tolist() == [3.0, 3.0, 10.0, 6.0, 6.0, 6.0]
    assert responses.means(values).tolist() == [1.5, 1.5, 10.0, 2.0, 2.0, 2.0]
    assert not responses.sums(values).requires_grad
