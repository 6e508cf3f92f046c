"""Weights over several processes: any layout can load and gather what any other saved."""

import pytest

import export
from stages import assert_same_files, call, convert_arguments, download_manifest, export_arguments, script, torchrun
from tiny_hub import DENSE, MOE, make_tiny_hub


@pytest.mark.slow
def test_weights_survive_every_change_of_layout(root, tmp_path, environment):
    for kind in (DENSE, MOE):
        make_tiny_hub(tmp_path / kind, kind)
    worker = root / "tests" / "distributed" / "layouts_worker.py"
    torchrun(4, str(worker), str(tmp_path / DENSE), str(tmp_path / MOE), env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DENSE, MOE])
def test_two_processes_convert_to_what_exports_to_the_same_bytes(monkeypatch, tmp_path, environment, kind):
    make_tiny_hub(tmp_path / "hub", kind, shards=2)
    download = download_manifest(tmp_path / "hub", tmp_path / "download.json")
    torchrun(2, script("convert"), *convert_arguments(download, tmp_path / "torch_dist"), env=environment)
    call(monkeypatch, export.main, export_arguments(download, tmp_path / "torch_dist.json", tmp_path / "hf"))
    assert_same_files(tmp_path / "hub", tmp_path / "hf")
