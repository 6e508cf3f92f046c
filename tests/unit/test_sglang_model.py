"""The folder that SGLang loads: the checkpoint's own, or one that describes a text-only checkpoint as it knows them."""

import json

import pytest
from transformers import AutoConfig

from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.rollout.sglang_model import folder_to_serve
from tiny_hub import DENSE, MOE, make_tiny_hub


def test_a_checkpoint_with_vision_is_served_from_its_own_folder(tmp_path):
    make_tiny_hub(tmp_path / "hub")
    assert folder_to_serve(tmp_path / "hub", tmp_path / "engine") == tmp_path / "hub"
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("kind", [DENSE, MOE])
def test_a_text_only_checkpoint_gets_a_description_that_sglang_knows(tmp_path, kind):
    hub = tmp_path / "hub"
    make_tiny_hub(hub, kind, shards=2)
    whole = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(whole["text_config"]))
    before = {file: file.read_bytes() for file in hub.iterdir()}
    for _ in range(2):  # a continued run finds the folder of the first
        served = folder_to_serve(hub, tmp_path / "engine")
    assert HubCheckpoint(served).entries == HubCheckpoint(hub).entries
    described = AutoConfig.from_pretrained(served)
    assert described.architectures == whole["architectures"] and described.model_type == whole["model_type"]
    assert described.text_config.to_diff_dict() == AutoConfig.from_pretrained(hub).to_diff_dict()
    assert described.tie_word_embeddings == (kind == DENSE)
    assert described.vision_config.out_hidden_size == described.text_config.hidden_size
    assert {file: file.read_bytes() for file in hub.iterdir()} == before
