"""Our Qwen3.5 on Megatron-Core against transformers', in one process and fp32."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import qwen3_5_reference as reference
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model
from milepost.qwen3_5.model import Qwen3_5, hidden_states, output_weight
from milepost.qwen3_5.packed import pack
from precision import assert_as_precise, computing_in, in_float64

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_process")]

LENGTHS = (70, 128, 33, 1, 3)


class Models(NamedTuple):
    """One set of weights in transformers' model and in ours, both in fp32 and in float64."""

    architecture: Architecture
    theirs: nn.Module
    ours: Qwen3_5
    exact: nn.Module
    ours_in_float64: Qwen3_5


@pytest.fixture(scope="module", params=["dense", "moe"])
def models(request, one_process) -> Models:
    architecture, theirs = reference.reference(request.param)
    whole = reference.megatron_names(architecture, dict(theirs.named_parameters()))
    ours = build_model(architecture)
    with in_float64():
        ours_in_float64 = build_model(architecture, dtype=torch.float64)
    for model in (ours, ours_in_float64):
        reference.load(model, whole, architecture)
    return Models(architecture, theirs, ours, reference.widened(theirs), ours_in_float64)


def sequences(seed: int = 0, lengths=LENGTHS) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randint(0, 512, (length,)) for length in lengths]


def logits(model: nn.Module, rows: list[Tensor]) -> Tensor:
    """Logits (tokens, vocabulary) of our model in one pack, or of transformers' row by row."""
    if not isinstance(model, Qwen3_5):
        return torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    ids, positions, packed = pack(rows)
    return model(ids, positions, None, packed_seq_params=packed)[0]


def logits_and_gradients(model: nn.Module, rows: list[Tensor], direction: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradients of logits x direction under our model's names."""
    with computing_in(next(model.parameters()).dtype):
        output = logits(model, rows)
        (output * direction.to(output)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {"logits": output} | gradients


def test_logits_and_every_gradient_equal_transformers(models):
    rows = sequences()
    direction = torch.randn(sum(LENGTHS), 512)

    def transformers(model: nn.Module) -> dict[str, Tensor]:
        found = logits_and_gradients(model, rows, direction)
        return {"logits": found.pop("logits")} | reference.megatron_names(models.architecture, found)

    theirs, exact = transformers(models.theirs), transformers(models.exact)
    assert_as_precise(logits_and_gradients(models.ours_in_float64, rows, direction), theirs, exact)
    assert_as_precise(logits_and_gradients(models.ours, rows, direction), theirs, exact)


def test_a_sequence_is_unmoved_by_its_neighbours_bit_for_bit(models):
    rows, others = sequences(0), sequences(1)
    with torch.no_grad():
        here = logits(models.ours, [others[0], rows[1], *others[2:]])[70:198]
        there = logits(models.ours, rows)[70:198]
        if models.architecture.is_moe:
            # An expert's matrix product may round differently for another number of tokens.
            with in_float64():
                exact = logits(models.exact, [rows[1]])
                here_in_float64 = logits(models.ours_in_float64, [others[0], rows[1], *others[2:]])[70:198]
            theirs = logits(models.theirs, [rows[1]])
            assert_as_precise(here, theirs, exact)
            assert_as_precise(here_in_float64, theirs, exact)
        else:
            assert torch.equal(here, there)


def test_recomputation_changes_no_gradient_by_a_bit(models):
    rows = sequences()
    gradients = []
    for recompute in ("none", "full", "selective"):
        model = build_model(models.architecture, recompute=recompute)
        model.load_state_dict(models.ours.state_dict())
        logits(model, rows).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        assert [name for name, gradient in gradients[0].items() if not torch.equal(other[name], gradient)] == []


def test_hidden_states_times_output_weight_are_the_logits(models):
    ours = models.ours
    ids, positions, packed = pack(sequences())
    with torch.no_grad():
        hidden = hidden_states(ours, ids, positions, packed)
        assert torch.equal(hidden @ output_weight(ours).T, logits(ours, sequences()))


def test_parameters_are_counted_right(models):
    architecture, ours = models.architecture, models.ours
    assert architecture.parameters() == sum(p.numel() for p in ours.parameters())
    with_mtp = build_model(architecture, mtp_num_layers=1, materialize=False)
    assert architecture.parameters(mtp_num_layers=1) == sum(p.numel() for p in with_mtp.parameters())


def test_a_skeleton_has_the_model_s_parameters_without_their_storage(models):
    architecture, ours = models.architecture, models.ours
    skeleton = build_model(architecture, materialize=False)
    assert all(p.is_meta for p in skeleton.parameters())
    assert {name: (p.shape, p.dtype) for name, p in skeleton.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in ours.named_parameters()
    }


def test_a_log_stays_fp32_whatever_the_model_is_cast_to(models):
    architecture, ours = models.architecture, models.ours
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
    rows = sequences()
    model = build_model(models.architecture, dtype=torch.bfloat16)
    model.load_state_dict(models.ours.state_dict())
    rounded = copy.deepcopy(models.theirs).bfloat16()
    with torch.no_grad():
        with in_float64():
            exact = logits(models.exact, rows)
        ours, theirs = ((logits(m, rows) - exact).norm().item() for m in (model, rounded))
    assert ours < 1.5 * theirs  # with a delta rule in bf16, 1.8 times
