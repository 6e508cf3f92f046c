"""Replayed routing: the routers do as they are told, and told their own choice nothing changes."""

import pytest
import torch
import torch.nn.functional as F
from test_grpo_policy import SHAPES, learner, models, policy, sequences

from configuration.schema import Mtp
from grpo.run_state import Progress
from grpo.samples import TrainingSequence
from qwen3_5.packed import pack
from qwen3_5.routing import replay_routing, take_routing_agreement

pytestmark = pytest.mark.usefixtures("one_process")


def own_choices(model, ids):
    """The experts that a sequence visits by itself: (T, layers x k)."""
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
def test_told_their_own_choice_the_routers_change_nothing(mtp):
    plain, found = sequences(SHAPES), []
    for told in (False, True):
        _, model, _ = models("moe", mtp_num_layers=int(mtp))
        batch = plain
        if told:
            batch = [TrainingSequence(s.ids, s.log_probs, s.advantage, own_choices(model, s.ids)) for s in plain]
        trained = learner(policy(model, budget=90, mtp=Mtp(train=mtp), replays_routing=told))
        metrics = trained.learn(batch, Progress())
        assert metrics.get("routing_agreement") == (pytest.approx(1.0, abs=1e-3) if told else None)
        found.append(trained.optimizer.gradients)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_layer_visits_the_experts_that_it_is_told():
    architecture, model, _ = models("moe")
    layer, tokens = model.decoder.layers[0].mlp, torch.randn(7, 1, architecture.hidden_size)
    experts = torch.rand(7, architecture.num_layers, architecture.num_experts).topk(architecture.experts_per_token)
    replay_routing(model, experts.indices)
    output, _ = layer(tokens)
    shared = layer.shared_experts(tokens)
    scores = tokens[:, 0] @ layer.router.weight.T
    for row, chosen in enumerate(experts.indices[:, 0]):
        shares = scores[row, chosen].softmax(0)
        expected = shared[row, 0]
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = (layer.experts.linear_fc1.weight[expert] @ tokens[row, 0]).chunk(2)
            expected = expected + share * (layer.experts.linear_fc2.weight[expert] @ (F.silu(gate) * up))
        torch.testing.assert_close(output[row, 0], expected, rtol=1e-4, atol=1e-5)
    chosen_alike = (scores.topk(experts.indices.shape[-1]).indices[:, :, None] == experts.indices[:, 0, None]).any(-1)
    assert take_routing_agreement(model) == pytest.approx(chosen_alike.float().mean().item())
    assert take_routing_agreement(model) is None
