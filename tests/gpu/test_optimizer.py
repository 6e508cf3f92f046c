"""The GPU optimizer against the CPU's, step by step; its state after saving, and its memory while asleep."""

import pytest
import torch
from safetensors.torch import load, save

from milepost.grpo import offloaded_adam
from milepost.grpo.cpu_optimizer import CpuAdam
from milepost.grpo.optimizer import build_optimizer
from milepost.qwen3_5.build import build_model
from qwen3_5_reference import load as load_weights
from qwen3_5_reference import megatron_names, reference
from settings import section

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_process")]


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    """Make even small weights pass through the host in pieces."""
    monkeypatch.setattr(offloaded_adam, "PIECE", 1000)


def models(kind="dense", dtype=torch.bfloat16):
    """The same weights on the GPU and on the CPU."""
    architecture, theirs = reference(kind)
    whole = megatron_names(architecture, dict(theirs.named_parameters()))
    pair = build_model(architecture, dtype=dtype), build_model(architecture, dtype=dtype).to("cpu")
    for model in pair:
        load_weights(model, whole, architecture)
    return pair


def set_gradients(gpu, cpu, optimizer, seed, scale):
    """Accumulate the same gradients in both, as a backward pass would."""
    generator = torch.Generator().manual_seed(seed)
    on_gpu = dict(gpu.named_parameters())
    for name, parameter in cpu.named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        optimizer.gradients[name].add_(gradient)
        on_gpu[name].main_grad.add_(gradient.cuda())


def step(gpu, cpu, ours, theirs, number, scale=1e-3):
    for optimizer in (ours, theirs):
        optimizer.zero_grad()
    set_gradients(gpu, cpu, theirs, number, scale)
    for optimizer in (ours, theirs):
        optimizer.reduce()
    return ours.step(1e-3), theirs.step(1e-3)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("cpu_offload", [False, True])
def test_steps_equal_those_of_the_cpu(kind, cpu_offload):
    gpu, cpu = models(kind)
    settings = section("optimizer", learning_rate=1e-3, cpu_offload=cpu_offload, clip_gradient_norm=1.0)
    ours, theirs = build_optimizer(gpu, settings), CpuAdam(cpu, settings)
    for number in range(4):
        norms = step(gpu, cpu, ours, theirs, number, scale=1e-3 * 10**number)  # the last ones are clipped
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    on_cpu = dict(cpu.named_parameters())
    for name, parameter in gpu.named_parameters():
        torch.testing.assert_close(parameter.cpu(), on_cpu[name].data, rtol=2**-7, atol=1e-6, msg=name)


def test_a_gradient_that_is_not_finite_changes_nothing():
    gpu, _ = models()
    optimizer = build_optimizer(gpu, section("optimizer", learning_rate=1e-3))
    before = {name: parameter.clone() for name, parameter in gpu.named_parameters()}
    optimizer.zero_grad()
    next(gpu.parameters()).main_grad.view(-1)[0] = torch.inf
    optimizer.reduce()
    assert not torch.isfinite(torch.tensor(optimizer.step(1e-3)))
    assert all(torch.equal(parameter, before[name]) for name, parameter in gpu.named_parameters())


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_a_saved_state_goes_on_bit_for_bit(cpu_offload):
    settings = section("optimizer", learning_rate=1e-3, cpu_offload=cpu_offload)
    gpu, cpu = models()
    ours, theirs = build_optimizer(gpu, settings), CpuAdam(cpu, settings)
    step(gpu, cpu, ours, theirs, 0)
    state = load(save({name: tensor.contiguous() for name, tensor in ours.state_dict().items()}))
    other, _ = models()
    with torch.no_grad():
        for mine, its in zip(gpu.parameters(), other.parameters(), strict=True):
            its.copy_(mine)
    resumed = build_optimizer(other, settings)
    resumed.load_state_dict(state)
    step(gpu, cpu, ours, theirs, 1)
    step(other, cpu, resumed, theirs, 1)
    for mine, its in zip(gpu.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_a_sleep_that_keeps_weights_and_states_frees_the_gradients(cpu_offload):
    gpu, cpu = models()
    optimizer = build_optimizer(gpu, section("optimizer", learning_rate=1e-3, cpu_offload=cpu_offload), stay=True)
    step(gpu, cpu, optimizer, CpuAdam(cpu, section("optimizer", learning_rate=1e-3)), 0)
    weights = {name: (parameter.data_ptr(), parameter.detach().cpu()) for name, parameter in gpu.named_parameters()}
    awake, gradients = torch.cuda.memory_allocated(), sum(4 * parameter.numel() for parameter in gpu.parameters())
    optimizer.sleep()
    assert awake - torch.cuda.memory_allocated() >= gradients
    for name, parameter in gpu.named_parameters():
        assert parameter.data_ptr() == weights[name][0] and torch.equal(parameter.cpu(), weights[name][1])
    optimizer.wake()
    optimizer.zero_grad()
    optimizer.reduce()
    assert optimizer.step(1e-3) == 0


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_a_sleep_frees_the_gpu_and_forgets_nothing(cpu_offload):
    torch.cuda.empty_cache()
    empty = torch.cuda.memory_allocated()
    gpu, cpu = models()
    optimizer = build_optimizer(gpu, section("optimizer", learning_rate=1e-3, cpu_offload=cpu_offload))
    step(gpu, cpu, optimizer, CpuAdam(cpu, section("optimizer", learning_rate=1e-3)), 0)
    weights = {name: parameter.detach().cpu() for name, parameter in gpu.named_parameters()}
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    awake = torch.cuda.memory_allocated()
    for _ in range(2):
        optimizer.sleep(weights=False)
        assert all(torch.equal(parameter.cpu(), weights[name]) for name, parameter in gpu.named_parameters())
        optimizer.sleep()
        assert torch.cuda.memory_allocated() - empty < 0.05 * (awake - empty)
        asleep = optimizer.state_dict()
        assert asleep.keys() == state.keys() and all(torch.equal(asleep[name], state[name]) for name in state)
        optimizer.wake(weights_only=True)
        assert all(torch.equal(parameter.cpu(), weights[name]) for name, parameter in gpu.named_parameters())
        optimizer.wake()
    again = optimizer.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)
    optimizer.zero_grad()
    optimizer.reduce()
    assert optimizer.step(1e-3) == 0
