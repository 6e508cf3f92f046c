"""The MTP layer: its labels, its mask, and the parameters that its loss trains."""

import pytest
import torch
import torch.nn.functional as F

import qwen3_5_reference as reference
from milepost.qwen3_5.build import build_model
from milepost.qwen3_5.model import hidden_states, output_weight
from milepost.qwen3_5.mtp import mtp_loss, mtp_targets
from milepost.qwen3_5.packed import pack
from precision import assert_sum_as_precise, computing_in, in_float64

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_process")]

ROWS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33, 34]]
RESPONSES = [[0, 0, 1, 1, 1], [0, 1], [0, 1, 1, 0]]  # as if the last response was truncated


@pytest.fixture(scope="module", params=["dense", "moe"])
def models(request, one_process):
    """(transformers' model, ours with an MTP layer whose transformer layer is a copy of decoder layer 3)."""
    return make_models(request.param)


def make_models(kind: str, dtype: torch.dtype = torch.float32):
    architecture, theirs = reference.reference(kind)
    whole = reference.megatron_names(architecture, dict(theirs.named_parameters()))
    whole |= reference.mtp_names(whole)
    with computing_in(dtype):
        ours = build_model(architecture, mtp_num_layers=1, dtype=dtype)
    reference.load(ours, whole, architecture)
    return theirs if dtype == torch.float32 else reference.widened(theirs), ours


def batch():
    ids, positions, packed = pack(ROWS)
    return ids, positions, packed, torch.tensor([[flag for response in RESPONSES for flag in response]])


def packed_loss(ours, **options) -> torch.Tensor:
    ids, positions, packed, responses = batch()
    return mtp_loss(ours, hidden_states(ours, ids, positions, packed), ids, responses, packed, **options)


def plain_losses(theirs, ours) -> torch.Tensor:
    """The loss of each counted token by its definition, token by token, with transformers' modules."""
    layer, norm = ours.mtp.layers[0], theirs.model.norm.__class__
    norms = {}
    for name in ("enorm", "hnorm", "final_layernorm"):
        norms[name] = norm(256)
        norms[name].weight = getattr(layer, name).weight
    losses = []
    for row, response in zip(ROWS, RESPONSES, strict=True):
        ids = torch.tensor([row])
        hidden = theirs.model(input_ids=ids).last_hidden_state
        following = theirs.model.embed_tokens(torch.tensor([[*row[1:], 0]]))
        joined = torch.cat([norms["enorm"](following), norms["hnorm"](hidden)], -1) @ layer.eh_proj.weight.T
        rotary = theirs.model.rotary_emb(joined, torch.arange(len(row))[None])
        future = torch.full((1, 1, len(row), len(row)), -torch.inf).triu(1)
        out = theirs.model.layers[3](joined, position_embeddings=rotary, attention_mask=future)
        logits = norms["final_layernorm"](out) @ theirs.lm_head.weight.T
        for place in range(len(row) - 2):
            if response[place + 2]:
                losses.append(F.cross_entropy(logits[0, place], torch.tensor(row[place + 2])))
    return torch.stack(losses)


def test_labels_and_mask_move_two_places_and_stop_at_the_end_of_a_sequence():
    ids, _, packed, responses = batch()
    labels, mask = mtp_targets(ids, responses, packed)
    assert labels.tolist() == [[13, 14, 15, 0, 0, 0, 0, 33, 34, 0, 0]]
    assert mask.int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0]]


@torch.no_grad()
def test_loss_equals_its_definition(models, request):
    theirs, ours = models
    theirs_in_float64, ours_in_float64 = make_models(request.node.callspec.params["models"], torch.float64)
    definition = plain_losses(theirs, ours)
    with in_float64():
        exact = plain_losses(theirs_in_float64, ours_in_float64)
        of_float64 = packed_loss(ours_in_float64, chunk=4)
        halved = packed_loss(ours_in_float64, token_count=8)
    assert_sum_as_precise(packed_loss(ours, chunk=4), torch.float32, definition / 4, exact / 4)
    assert_sum_as_precise(of_float64, torch.float64, definition / 4, exact / 4)
    assert_sum_as_precise(halved, torch.float64, definition / 8, exact / 8)


def test_loss_is_zero_not_nan_where_no_token_counts(models):
    _, ours = models
    ids, positions, packed, responses = batch()
    loss = mtp_loss(ours, hidden_states(ours, ids, positions, packed), ids, responses * 0, packed)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for name, p in ours.named_parameters() if name.startswith("mtp."))
    ours.zero_grad()


def test_training_the_mtp_layer_leaves_trunk_embedding_and_head_unchanged(models):
    _, ours = models
    ids, positions, packed, responses = batch()

    def gradients(with_mtp: bool):
        ours.zero_grad()
        hidden = hidden_states(ours, ids, positions, packed)
        loss = (hidden @ output_weight(ours).T).square().mean()
        if with_mtp:
            loss = loss + 0.2 * mtp_loss(ours, hidden, ids, responses, packed)
        loss.backward()
        return {name: p.grad for name, p in ours.named_parameters()}

    without, together = gradients(False), gradients(True)
    for name, gradient in together.items():
        if name.startswith("mtp."):
            # An expert may get no token, but no whole parameter stays without a gradient.
            assert without[name] is None and gradient.any(), name
        else:
            assert torch.equal(gradient, without[name]), name


def test_recomputation_changes_no_gradient_by_a_bit(models):
    _, ours = models
    ids, positions, packed, responses = batch()
    gradients = []
    for granularity in (None, "full"):
        ours.zero_grad()
        ours.mtp.layers[0].config.recompute_granularity = granularity
        ours.mtp.layers[0].config.recompute_method = "uniform"
        ours.mtp.layers[0].config.recompute_num_layers = 1
        with torch.no_grad():
            hidden = hidden_states(ours, ids, positions, packed)
        mtp_loss(ours, hidden, ids, responses, packed).backward()
        gradients.append({name: p.grad.clone() for name, p in ours.mtp.named_parameters()})
    ours.mtp.layers[0].config.recompute_granularity = None
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
