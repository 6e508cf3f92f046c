"""Fused GPU kernels against float64 on the CPU: values, gradients, any number of rows."""

import pytest
import torch

from milepost.grpo.log_probs import token_log_probs
from milepost.qwen3_5 import attention, gated_delta_net, kernels, norms
from milepost.qwen3_5.copies import copy_rows, find_copies, sum_copies

pytestmark = pytest.mark.gpu


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype)


CASES = {
    "norm": (norms._norm, [(1, 2560)], {"weight": draw(2560), "offset": 1.0, "eps": 1e-6}),
    "norm of heads": (norms._norm, [(4, 256)], {"weight": draw(256), "offset": 1.0, "eps": 1e-6}),
    "gated norm": (norms._gated_norm, [(32, 128), (32, 128)], {"weight": draw(128), "eps": 1e-6}),
    "rotation": (attention.rotate, [(4, 256), (1, 64), (1, 64)], {}),
    "gate": (attention._gate, [(4096,), (4096,)], {}),
    "SwiGLU": (kernels.swiglu, [(1, 2 * 9216)], {}),
    "SwiGLU of experts": (kernels.swiglu, [(2 * 512,), ()], {}),
    "gates of the state": (
        gated_delta_net._log_decay_and_beta,
        [(32,), (32,)],
        {"a_log": torch.rand(32), "dt_bias": draw(32)},
    ),
}


def outputs_and_gradients(function, rows, constants):
    inputs = [x.requires_grad_() for x in (*rows, *constants.values()) if isinstance(x, torch.Tensor)]
    outputs = function(*rows, **constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    directions = [torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape).to(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, inputs, directions)
    return [x.detach().double().cpu() for x in (*outputs, *gradients)]


@pytest.mark.parametrize("case", CASES)
def test_fused_arithmetic_is_right(case):
    function, shapes, constants = CASES[case]
    for number in (64, 1, 1000, 777):
        rows = [draw(number, *shape) for shape in shapes]
        given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in constants.items()}
        exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        here = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        expected = outputs_and_gradients(function.__wrapped__, [x.double() for x in rows], exact)
        found = outputs_and_gradients(function, [x.cuda() for x in rows], here)
        for ours, right in zip(found, expected, strict=True):
            assert (ours - right).norm() < 0.01 * right.norm() + 1e-6, (number, ours, right)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_log_probs_and_their_gradients_are_right(temperature, with_entropy):
    hidden, weight = draw(150, 256), (0.1 * torch.randn(50000, 256)).bfloat16()
    targets = torch.randint(50000, (150,))
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        log_probs, entropy = token_log_probs(
            *inputs, targets.to(device), temperature=temperature, chunk=64, with_entropy=with_entropy
        )
        loss = (log_probs * torch.linspace(-1, 1, 150).to(log_probs)).sum()
        if with_entropy:
            loss = loss + (entropy * torch.linspace(1, 0, 150).to(entropy)).sum()
        gradients = torch.autograd.grad(loss, inputs)
        found.append([x.detach().double().cpu() for x in (log_probs, *([entropy] if with_entropy else []), *gradients)])
    expected, ours = found
    for here, right in zip(ours, expected, strict=True):
        assert (here - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("rows", [1000, 7])
def test_copies_and_their_sums_are_right(rows):
    wanted = torch.rand(rows, 9).argsort(1) < (torch.arange(rows) % 5)[:, None]  # none to four each
    count, found = int(wanted.sum()), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        _, copies = find_copies(wanted.to(device), count, 4)
        inputs = [draw(number, 512).to(device).requires_grad_() for number in (rows, count)]
        outputs = copy_rows(inputs[0], copies), sum_copies(inputs[1], copies)
        directions = [torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) for x in outputs]
        found.append([x.float().cpu() for x in (*outputs, *torch.autograd.grad(outputs, inputs, directions))])
    for ours, right in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, right, rtol=0.01, atol=1e-6)
