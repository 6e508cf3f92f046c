"""Routing replay: routers use the given experts, and replaying their own choice changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from test_grpo_policy import SHAPES, learned, models, sequences

from milepost.grpo.samples import TrainingSequence
from milepost.qwen3_5.packed import pack
from milepost.qwen3_5.routing import replay_routing, take_routing_agreement
from precision import assert_as_precise, in_float64

pytestmark = [pytest.mark.numerical, pytest.mark.usefixtures("one_process")]


def own_choices(model, ids):
    """The experts that a sequence visits without replay: (T, layers x k)."""
    seen = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda _, __, output: seen.append(output[1]))
        for layer in model.decoder.layers
    ]
    input_ids, positions, packed = pack([ids])
    with torch.no_grad():
        model(input_ids, positions, None, packed_seq_params=packed)
    for hook in hooks:
        hook.remove()
    return torch.cat([visited.nonzero()[:, 1].view(len(ids), -1) for visited in seen], dim=1).short()


@pytest.mark.parametrize("mtp", [False, True])
def test_replaying_the_routers_own_choice_changes_nothing(mtp):
    plain = sequences(SHAPES)
    rounded, free, told = (models("moe", int(mtp), dtype)[1] for dtype in (torch.float32, torch.float64, torch.float64))
    with in_float64():
        routed = [TrainingSequence(s.ids, s.log_probs, s.advantage, own_choices(told, s.ids)) for s in plain]
    _, reference = learned(rounded, plain, budget=90, mtp=mtp)
    metrics, exact = learned(free, plain, budget=90, mtp=mtp)
    metrics_told, found = learned(told, routed, budget=90, mtp=mtp, replays_routing=True)
    assert "routing_agreement" not in metrics and metrics_told["routing_agreement"] == 1
    assert_as_precise(found, reference, exact)


@torch.no_grad()
def test_a_layer_visits_the_replayed_experts():
    architecture, model, _ = models("moe")
    _, model_in_float64, _ = models("moe", dtype=torch.float64)
    tokens = torch.randn(7, 1, architecture.hidden_size)
    experts = torch.rand(7, architecture.num_layers, architecture.num_experts).topk(architecture.experts_per_token)

    def told_and_plain(model, tokens):
        """The first layer's outputs for replayed experts, and the same computed directly: (7, hidden) each."""
        layer = model.decoder.layers[0].mlp
        replay_routing(model, experts.indices)
        output, _ = layer(tokens)
        expected = layer.shared_experts(tokens)[:, 0].clone()
        scores = tokens[:, 0] @ layer.router.weight.T
        for row, chosen in enumerate(experts.indices[:, 0]):
            for expert, share in zip(chosen, scores[row, chosen].softmax(0), strict=True):
                gate, up = (layer.experts.linear_fc1.weight[expert] @ tokens[row, 0]).chunk(2)
                expected[row] += share * (layer.experts.linear_fc2.weight[expert] @ (F.silu(gate) * up))
        return output[:, 0], expected

    found, reference = told_and_plain(model, tokens)
    with in_float64():
        found_in_float64, exact = told_and_plain(model_in_float64, tokens.double())
    assert_as_precise(found, reference, exact)
    assert_as_precise(found_in_float64, reference, exact)


def test_the_agreement_is_the_share_of_choices_the_routers_share():
    architecture, model, _ = models("moe")
    layer, tokens = model.decoder.layers[0].mlp, torch.randn(7, 1, architecture.hidden_size)
    experts = torch.rand(7, architecture.num_layers, architecture.num_experts).topk(architecture.experts_per_token)
    replay_routing(model, experts.indices)
    layer(tokens)
    own = (tokens[:, 0] @ layer.router.weight.T).topk(architecture.experts_per_token).indices
    alike = (own[:, :, None] == experts.indices[:, 0, None]).any(-1)
    assert take_routing_agreement(model) == pytest.approx(alike.double().mean().item())
    assert take_routing_agreement(model) is None
