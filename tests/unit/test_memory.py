"""The memory estimate follows what a recipe asks for, where nothing was measured."""

import pytest

from configuration.loading import load
from configuration.memory import estimate
from configuration.shape import architecture_of


@pytest.mark.parametrize(
    ("response", "context", "packs"),
    [
        (16384, 1, 1),  # with a prompt of 2048 just what two GPUs take
        (34816, 1, 2),
        (34816, 2, 1),
        (71680, 2, 2),
    ],
)
def test_a_sequence_longer_than_a_pack_is_counted_whole(root, response, context, packs):
    def activations(**changes):
        changes["training"] = {"recompute": "full"}
        model = load(root / "config/config.yaml", root / "config/models", {"per_model": {"9B": changes}}).models["9B"]
        return estimate(architecture_of(model), model, 141).activations

    needed = activations(sampling={"max_response_tokens": response}, parallel={"context": context})
    assert needed == pytest.approx(packs * activations())


def test_longer_responses_are_recomputed_further(root):
    overrides = {"sampling": {"max_response_tokens": 32768}}
    models = [load(root / "config/config.yaml", root / "config/models", changes).models for changes in ({}, overrides)]
    ways = [estimate(architecture_of(model), model, 141).recompute for model in (m["35B_A3B"] for m in models)]
    assert ways == ["none", "full"]
