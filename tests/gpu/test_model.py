"""The model on a GPU (bf16, flash attention, Triton kernels) against transformers in fp32 on the CPU.

The error of bf16 depends on the weights, so ours is bounded by the error of transformers' model in bf16, with the same
parameter of all layers taken together.
"""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from milepost.qwen3_5.build import build_model
from milepost.qwen3_5.model import hidden_states
from milepost.qwen3_5.packed import pack
from precision import MARGIN, differences, norms
from qwen3_5_reference import load, megatron_names, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_process")]
LENGTHS = (70, 128, 33, 1, 300)
OUTPUTS_OFF = 1.3  # times the error of transformers in bf16
GRADIENTS_OFF = 2.0


@pytest.fixture(scope="module", params=["dense", "moe"])
def models(request, one_process):
    """(architecture, transformers' model in fp32 and in bf16 on the CPU, ours in bf16 on the GPU) of equal weights."""
    # Every token goes to every expert, with similar weights: sharp routers would triple rounding errors in every layer.
    gentle = {"num_experts_per_tok": 8, "router_spread": 0.05} if request.param == "moe" else {}
    architecture, theirs = reference(request.param, **gentle)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.bfloat16().float()  # the comparison is not about the rounding of weights
    ours = build_model(architecture)
    load(ours, megatron_names(architecture, dict(theirs.named_parameters())), architecture)
    return architecture, theirs, copy.deepcopy(theirs).bfloat16(), ours


def sequences(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(512, (length,), generator=generator) for length in LENGTHS]


def logits(model, rows: list[Tensor]) -> Tensor:
    ids, positions, packed = pack(rows, device="cuda")
    return model(ids, positions, None, packed_seq_params=packed)[0]


def distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float()
    return ((ours - theirs).norm() / theirs.norm()).item()


class Transformers(NamedTuple):
    """What transformers computes for `sequences`, and its gradients of logits x direction under our names."""

    logits: Tensor
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def direction() -> Tensor:
    return torch.randn(sum(LENGTHS), 512, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(models, direction) -> tuple[Transformers, Transformers]:
    """By transformers in fp32 and in bf16."""
    architecture, theirs, rounded, _ = models

    def compute(model) -> Transformers:
        found = torch.cat([model(input_ids=row[None]).logits[0] for row in sequences()])
        (found.float() * direction).sum().backward()
        gradients = megatron_names(architecture, {name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
        return Transformers(found.detach(), gradients)

    return compute(theirs), compute(rounded)


def gradients_of(model, direction: Tensor) -> dict[str, Tensor]:
    (logits(model, sequences()).float() * direction.to("cuda")).sum().backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


def assert_near(gradients: dict[str, Tensor], others: dict[str, Tensor], expected) -> None:
    """Assert that each kind of gradient is hardly further off than transformers' in bf16 is from fp32."""
    exact, bf16 = expected
    off, may_be = norms(differences(gradients, others)), norms(differences(bf16.gradients, exact.gradients))
    # The gates' gradients are a few sums with cancellation, and transformers computes them in fp32.
    times = {kind: MARGIN if kind.endswith(("A_log", "dt_bias")) else GRADIENTS_OFF for kind in off}
    assert {kind: (off[kind], may_be[kind]) for kind in off if off[kind] > times[kind] * may_be[kind]} == {}


@torch.no_grad()
def test_every_layer_s_output_is_transformers(models):
    architecture, theirs, rounded, ours = models
    rows, outputs = sequences(), []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output[0][:, 0]))
        for layer in ours.decoder.layers
    ]
    ids, positions, packed = pack(rows, device="cuda")
    hidden_states(ours, ids, positions, packed)
    for hook in hooks:
        hook.remove()

    def layers(model) -> list[Tensor]:
        # hidden_states[0] are the embeddings; the last one is after the final norm.
        of_rows = [model(input_ids=row[None], output_hidden_states=True).hidden_states[1:-1] for row in rows]
        return [torch.cat([of_row[number][0] for of_row in of_rows]) for number in range(len(of_rows[0]))]

    exact, bf16 = layers(theirs), layers(rounded)
    for number, kind in enumerate(architecture.layer_kinds[:-1]):
        off, may_be = distance(outputs[number], exact[number]), distance(bf16[number], exact[number])
        assert off < OUTPUTS_OFF * may_be, f"layer {number}, {kind}: {off}, and transformers in bf16 {may_be}"


def test_logits_and_gradients_are_transformers(models, expected, direction):
    ours, (exact, bf16) = models[-1], expected
    with torch.no_grad():
        output = logits(ours, sequences())
    assert distance(output, exact.logits) < OUTPUTS_OFF * distance(bf16.logits, exact.logits)
    assert_near(gradients_of(ours, direction), exact.gradients, expected)


@torch.no_grad()
def test_a_sequence_is_unmoved_by_its_neighbours(models, expected):
    ours, (exact, bf16) = models[-1], expected
    rows, others = sequences(0), sequences(1)
    here = logits(ours, [others[0], rows[1], *others[2:]])[70:198]
    there = logits(ours, rows)[70:198]
    assert distance(here, there.cpu()) < distance(bf16.logits[70:198], exact.logits[70:198])


def test_recomputation_changes_no_gradient(models, expected, direction):
    architecture, *_, ours = models
    gradients = []
    for recompute in ("none", "full", "selective"):
        model = build_model(architecture, recompute=recompute)
        model.load_state_dict(ours.state_dict())
        gradients.append(gradients_of(model, direction))
    for other in gradients[1:]:
        assert_near(other, gradients[0], expected)
