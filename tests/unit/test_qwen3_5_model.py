"""Our Qwen3.5 on Megatron-Core against transformers' own, one process, fp32."""

import copy

import pytest
import torch
from torch import Tensor

import qwen3_5_reference as reference
from qwen3_5.build import build_model
from qwen3_5.model import hidden_states, output_weight
from qwen3_5.packed import pack

pytestmark = pytest.mark.usefixtures("one_process")

LENGTHS = (70, 128, 33, 1, 3)


@pytest.fixture(scope="module", params=["dense", "moe"])
def models(request, one_process):
    """(architecture, transformers' model, ours) with the same weights."""
    architecture, theirs = reference.reference(request.param)
    ours = build_model(architecture)
    reference.load(ours, reference.megatron_names(architecture, dict(theirs.named_parameters())), architecture)
    return architecture, theirs, ours


def sequences(seed: int = 0, lengths=LENGTHS) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randint(0, 512, (length,)) for length in lengths]


def logits(model, rows: list[Tensor]) -> Tensor:
    ids, positions, packed = pack(rows)
    return model(ids, positions, None, packed_seq_params=packed)[0]


def distance(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_logits_and_every_gradient_equal_transformers(models):
    architecture, theirs, ours = models
    rows = sequences()
    expected = torch.cat([theirs(input_ids=row[None]).logits[0] for row in rows])
    output = logits(ours, rows)
    assert distance(output, expected) < 1e-5
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    wanted = reference.megatron_names(architecture, {name: p.grad for name, p in theirs.named_parameters()})
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    far = {name: distance(p.grad, wanted[name]) for name, p in ours.named_parameters()}
    # The gates of Gated DeltaNet sum over all tokens what nearly cancels.
    assert {name: d for name, d in far.items() if d > (1e-3 if name.endswith(("A_log", "dt_bias")) else 5e-5)} == {}
    ours.zero_grad()
    theirs.zero_grad()


def test_a_sequence_is_unmoved_by_its_neighbours_bit_for_bit(models):
    _, _, ours = models
    rows, others = sequences(0), sequences(1)
    with torch.no_grad():
        here = logits(ours, [others[0], rows[1], *others[2:]])[70:198]
        there = logits(ours, rows)[70:198]
    if models[0].is_moe:
        # An expert's matrix product may round differently for another number of tokens.
        assert distance(here, there) < 1e-6
    else:
        assert torch.equal(here, there)


def test_recomputation_changes_no_gradient(models):
    architecture, _, ours = models
    rows = sequences()
    gradients = []
    for recompute in ("none", "full", "selective"):
        model = build_model(architecture, recompute=recompute)
        model.load_state_dict(ours.state_dict())
        logits(model, rows).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_hidden_states_times_output_weight_are_the_logits(models):
    _, _, ours = models
    ids, positions, packed = pack(sequences())
    with torch.no_grad():
        hidden = hidden_states(ours, ids, positions, packed)
        assert torch.equal(hidden @ output_weight(ours).T, logits(ours, sequences()))


def test_parameters_are_counted_right(models):
    architecture, _, ours = models
    assert architecture.parameters() == sum(p.numel() for p in ours.parameters())
    with_mtp = build_model(architecture, mtp_num_layers=1, materialize=False)
    assert architecture.parameters(mtp_num_layers=1) == sum(p.numel() for p in with_mtp.parameters())


def test_a_skeleton_has_the_model_s_parameters_without_their_storage(models):
    architecture, _, ours = models
    skeleton = build_model(architecture, materialize=False)
    assert all(p.is_meta for p in skeleton.parameters())
    assert {name: (p.shape, p.dtype) for name, p in skeleton.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in ours.named_parameters()
    }


def test_a_log_stays_fp32_whatever_the_model_is_cast_to(models):
    architecture, _, ours = models
    model = build_model(architecture, dtype=torch.bfloat16)
    a_log = {name: p for name, p in model.named_parameters() if name.endswith("A_log")}
    assert len(a_log) == 3
    assert all(p.dtype == torch.float32 for p in a_log.values())
    others = [p for name, p in model.named_parameters() if name not in a_log]
    assert all(p.dtype == torch.bfloat16 for p in others)
    model.load_state_dict(ours.state_dict())
    model.bfloat16()
    for name, parameter in a_log.items():
        assert torch.equal(parameter, ours.get_parameter(name))


def test_bfloat16_strays_no_further_from_fp32_than_transformers_does(models):
    architecture, theirs, ours = models
    rows = sequences()
    model = build_model(architecture, dtype=torch.bfloat16)
    model.load_state_dict(ours.state_dict())
    rounded = copy.deepcopy(theirs).bfloat16()
    with torch.no_grad():
        exact = logits(ours, rows)
        expected = distance(torch.cat([rounded(input_ids=row[None]).logits[0] for row in rows]).float(), exact)
        assert distance(logits(model, rows).float(), exact) < 1.3 * expected
