"""The model as GPUs compute it (bf16, flash attention, Triton kernels) against transformers in fp32 on the CPU."""

import pytest
import torch
from torch import Tensor

from qwen3_5.build import build_model
from qwen3_5.model import hidden_states
from qwen3_5.packed import pack
from qwen3_5_reference import load, megatron_names, reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_process")]
LENGTHS = (70, 128, 33, 1, 300)


@pytest.fixture(scope="module", params=["dense", "moe"])
def models(request, one_process):
    """(architecture, transformers' model in fp32 on the CPU, ours in bf16 on the GPU) with the same weights."""
    # Every token goes to every expert, lest rounding send some elsewhere than the reference does.
    architecture, theirs = reference(request.param, **({"num_experts_per_tok": 8} if request.param == "moe" else {}))
    for parameter in theirs.parameters():
        parameter.data = parameter.data.bfloat16().float()  # the rounding of weights is not what is compared
    ours = build_model(architecture)
    load(ours, megatron_names(architecture, dict(theirs.named_parameters())), architecture)
    return architecture, theirs, ours


def sequences(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(512, (length,), generator=generator) for length in LENGTHS]


def logits(model, rows: list[Tensor]) -> Tensor:
    ids, positions, packed = pack(rows, device="cuda")
    return model(ids, positions, None, packed_seq_params=packed)[0]


def distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float()
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def test_every_layer_s_output_is_transformers(models):
    architecture, theirs, ours = models
    rows, outputs = sequences(), []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output[0][:, 0]))
        for layer in ours.decoder.layers
    ]
    ids, positions, packed = pack(rows, device="cuda")
    hidden_states(ours, ids, positions, packed)
    for hook in hooks:
        hook.remove()
    # hidden_states[0] are the embeddings; the last one has been through the final norm.
    expected = [theirs(input_ids=row[None], output_hidden_states=True).hidden_states[1:-1] for row in rows]
    for number, kind in enumerate(architecture.layer_kinds[:-1]):
        far = distance(outputs[number], torch.cat([of_row[number][0] for of_row in expected]))
        assert far < 0.02, f"layer {number}, {kind}: {far}"


def test_logits_and_gradients_are_transformers(models):
    architecture, theirs, ours = models
    rows = sequences()
    expected = torch.cat([theirs(input_ids=row[None]).logits[0] for row in rows])
    output = logits(ours, rows)
    assert distance(output, expected) < 0.03
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (output.float() * direction.cuda()).sum().backward()
    (expected * direction).sum().backward()
    wanted = megatron_names(architecture, {name: p.grad for name, p in theirs.named_parameters()})
    far = {name: distance(p.grad, wanted[name]) for name, p in ours.named_parameters()}
    # The gates of Gated DeltaNet sum over all tokens what nearly cancels, the router what bf16 may send elsewhere.
    loose = ("A_log", "dt_bias", "router.weight", "gate_weight")
    assert {name: d for name, d in far.items() if d > (0.3 if name.endswith(loose) else 0.08)} == {}
    ours.zero_grad()
    theirs.zero_grad()


@torch.no_grad()
def test_a_sequence_is_unmoved_by_its_neighbours(models):
    _, _, ours = models
    rows, others = sequences(0), sequences(1)
    here = logits(ours, [others[0], rows[1], *others[2:]])[70:198]
    there = logits(ours, rows)[70:198]
    assert distance(here, there.cpu()) < 1e-3


def test_recomputation_changes_no_gradient(models):
    architecture, _, ours = models
    gradients = []
    for recompute in ("none", "full", "selective"):
        model = build_model(architecture, recompute=recompute)
        model.load_state_dict(ours.state_dict())
        logits(model, sequences()).float().square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert distance(other[name], gradient.cpu()) < 0.01, name
