"""The CPU optimizer against torch's own, step for step, and across a save and a load."""

import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from milepost.grpo.cpu_optimizer import CpuAdam
from milepost.grpo.optimizer import learning_rate_at
from precision import assert_as_precise, computing_in
from settings import section

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_process")]


class Toy(nn.Module):
    """Weights of the kinds that weight decay tells apart: a matrix, a bias, a norm, a convolution."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = {"linear": (5, 7), "norm": (7,), "conv": (5, 1, 4)}
        self.weights = nn.ParameterDict({k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()})
        self.experts = nn.Module()
        self.experts.bias = nn.Parameter(torch.randn(2, 2, generator=generator).to(dtype))
        self.layer = nn.Linear(5, 3).to(dtype)
        self.layer.weight.data = torch.randn(3, 5, generator=generator).to(dtype)
        self.layer.bias.data = torch.randn(3, generator=generator).to(dtype)


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        (parameter * direction.to(parameter.dtype)).sum().backward()


def step(model, optimizer, number, rate=1e-2):
    optimizer.zero_grad()
    for half in range(2):  # two packs
        backward(model, 10 * number + half)
    optimizer.reduce()
    return optimizer.step(rate)


def torch_reference(model, settings):
    """torch.optim.AdamW with the decay of matrices alone, and torch's own clipping."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith(".bias")]
    exempt = [p for n, p in model.named_parameters() if p.dim() == 1 or n.endswith(".bias")]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.epsilon)


def weights(model):
    return [parameter.detach().flatten().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
def test_steps_equal_adamw_with_accumulated_and_clipped_gradients(clip):
    settings = section("optimizer", learning_rate=1e-2, clip_gradient_norm=clip)

    def steps(dtype):
        """The norms and weights of five steps, (torch's, ours)."""
        model, same = Toy(dtype), Toy(dtype)
        with computing_in(dtype):
            optimizer, reference = CpuAdam(model, settings), torch_reference(same, settings)
            found, expected = [], []
            for number in range(5):
                norm = step(model, optimizer, number, rate := 1e-2 * (number + 1))
                reference.zero_grad()
                for half in range(2):
                    backward(same, 10 * number + half)
                theirs = nn.utils.clip_grad_norm_(same.parameters(), clip or math.inf)
                for group in reference.param_groups:
                    group["lr"] = rate
                reference.step()
                found += [
                    torch.tensor([norm], dtype=dtype),
                    *(p.detach().flatten().clone() for p in model.parameters()),
                ]
                expected += [theirs[None], *(p.detach().flatten().clone() for p in same.parameters())]
        return torch.cat(expected), torch.cat(found)

    reference, found = steps(torch.float32)
    exact, found_in_float64 = steps(torch.float64)
    assert_as_precise(found, reference, exact)
    assert_as_precise(found_in_float64, reference, exact)


def test_weight_decay_leaves_biases_norms_and_other_vectors_alone():
    model = Toy()
    optimizer = CpuAdam(model, section("optimizer", weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(0.1)  # no gradient: decay alone moves weights
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"weights.linear", "weights.conv", "layer.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_optimizer_takes_the_very_steps_that_the_unstopped_one_takes(dtype):
    settings = section("optimizer", learning_rate=1e-2)
    straight = Toy(dtype)
    optimizer = CpuAdam(straight, settings)
    for number in range(3):
        step(straight, optimizer, number)
    stored, weights = save(optimizer.state_dict()), {k: v.clone() for k, v in straight.state_dict().items()}

    resumed = Toy(dtype)
    resumed.load_state_dict(weights)
    again = CpuAdam(resumed, settings)
    again.load_state_dict(load(stored))
    for number in range(3, 6):
        assert step(straight, optimizer, number) == step(resumed, again, number)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_updates_too_small_for_bf16_add_up_in_the_fp32_copy():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    optimizer = CpuAdam(model, section("optimizer", weight_decay=0.0))
    for _ in range(10):
        optimizer.zero_grad()
        model.weight.sum().backward()
        optimizer.step(1e-3)  # bf16's spacing below 1 is 4e-3
    assert model.weight.item() == torch.tensor(0.99).bfloat16().item()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison):
    model = Toy()
    optimizer = CpuAdam(model, section("optimizer"))
    step(model, optimizer, 0)
    weights, state = save(dict(model.state_dict())), save(optimizer.state_dict())
    optimizer.zero_grad()
    backward(model, 1)
    (model.layer.bias * poison).sum().backward()
    assert not math.isfinite(optimizer.step(1e-2))
    assert save(dict(model.state_dict())) == weights and save(optimizer.state_dict()) == state


def test_learning_rate_warms_up_linearly_and_then_stays():
    warming = section("optimizer", learning_rate=8e-6, warm_up_steps=4)
    assert [learning_rate_at(step, warming) for step in range(1, 7)] == [2e-6, 4e-6, 6e-6, 8e-6, 8e-6, 8e-6]
    assert learning_rate_at(1, section("optimizer", learning_rate=1e-6)) == 1e-6
