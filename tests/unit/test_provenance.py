"""A result is stale when, and only when, something changed that it depends on."""

import json

import pytest

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
        assert json.loads(after)["config"]["architecture"]["layers"] == 36
