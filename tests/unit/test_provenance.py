"""A result is stale when, and only when, something changed that it depends on."""

import pytest

from configuration import provenance
from configuration.loading import load
from configuration.provenance import Provenance


@pytest.mark.parametrize(("name", "depends"), [("4B", True), ("tiny", False)])
def test_a_download_depends_on_the_shape_that_it_must_have(root, name, depends):
    def download(**changes):
        overrides = {"per_model": {name: changes}}
        configuration = load(root / "config/config.yaml", root / "config/models", overrides)
        return Provenance(configuration, root / "workflow_scripts").of("download", model=name)

    shape = load(root / "config/config.yaml", root / "config/models", {}).models["4B"].architecture.model_dump()
    before, after = download(architecture=shape), download(architecture=shape | {"layers": 36})
    assert (before != after) == depends
    if depends:
        assert after["config"]["architecture"]["layers"] == 36


def test_a_local_data_set_whose_content_changes_is_another(root, tmp_path):
    def key():
        overrides = {"datasets": {"mine": {"folder": str(tmp_path), "file": "mine.jsonl"}}}
        configuration = load(root / "config/config.yaml", root / "config/models", overrides)
        provenance._content.cache_clear()  # a run of its own
        return Provenance(configuration, root / "workflow_scripts").key("dataset", name="mine")

    keys = [key()]
    for content in ("one", "two"):
        (tmp_path / "mine.jsonl").write_text(content)
        keys.append(key())
    assert len(set(keys)) == 3 and key() == keys[-1]


@pytest.mark.parametrize(
    ("changes", "continues"),
    [
        ({"training": {"rollouts": 5000}}, True),
        ({"training": {"max_tokens_per_gpu": 4608, "recompute": "full"}}, True),  # as after running out of memory
        ({"engine": {"mem_fraction_static": 0.4}}, True),
        ({"optimizer": {"learning_rate": 1e-5}}, False),
        ({"engine": {"server_arguments": {"attention_backend": "triton"}}}, False),
    ],
)
def test_what_continues_a_training_and_what_begins_another(root, changes, continues):
    def work(**overrides):
        configuration = load(root / "config/config.yaml", root / "config/models", {"per_model": {"9B": overrides}})
        return Provenance(configuration, root / "workflow_scripts").work("9B")

    assert (work() == work(**changes)) == continues


def test_an_evaluation_does_not_depend_on_what_its_engine_does_for_a_training_alone(root):
    def key(**engine):
        overrides = {"per_model": {"35B_A3B": {"engine": engine}}}
        configuration = load(root / "config/config.yaml", root / "config/models", overrides)
        provenance = Provenance(configuration, root / "workflow_scripts")
        return provenance.key("evaluate", model="35B_A3B", dataset="aime-2024", weights="base")

    assert key() == key(mem_fraction_static=0.4, check_weights=True, replay_routing=True)
    assert key() != key(speculation=None)
