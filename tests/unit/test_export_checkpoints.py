"""Each checkpoint of a run is exported: the last, the best by validation, or one by its number."""

import json

import pytest
import torch

import convert
import export
from milepost.checkpoints import torch_dist
from milepost.checkpoints.manifest import read_manifest, write_manifest
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, finalize, initialize
from stages import call, convert_arguments, download_manifest, export_arguments, flip_a_bit, job_arguments
from tiny_hub import DENSE, make_tiny_hub

NAME = "model.language_model.norm.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a download, and of a run of three checkpoints; the n-th has all weights times 1 + n."""
    folder = tmp_path_factory.mktemp("run")
    make_tiny_hub(folder / "hub", kind=DENSE)
    download = download_manifest(folder / "hub", folder / "download.json")
    with pytest.MonkeyPatch.context() as patch:
        call(patch, convert.main, convert_arguments(download, folder / "torch_dist"))
    work = folder / "grpo/work"
    initialize()
    for rollout in (1, 2, 3):
        model = build_model(Architecture.from_folder(folder / "hub"), dtype=torch.float32)
        torch_dist.load(model, read_manifest(folder / "torch_dist.json").root)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + rollout)
        saved = work / f"checkpoint-00000{rollout}"
        torch_dist.save(model, saved / "weights")
        files = [str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()]
        write_manifest(saved / "manifest.json", "checkpoint", saved, files, {})
    finalize()
    log = [{"rollout": n, "validation_average": share, "validation_standard_error": 0.1} for n, share in
           enumerate([0.5, 0.2, 0.6, 0.4])]  # fmt: skip
    (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    last = [f"checkpoint-000003/{name}" for name in files if name.startswith("weights/")]
    facts = {"weights": "checkpoint-000003/weights", "checkpoint": "checkpoint-000003", "metrics": "metrics.jsonl"}
    facts["best"] = {"checkpoint": "checkpoint-000002", "score": 0.6}
    record = {"config": {"validation": {"dataset": "aime"}}}
    write_manifest(folder / "grpo/train.json", "train", work, last, record, facts)
    return folder


def exported(monkeypatch, run, checkpoint, name=None):
    folder = run / "hf" / (name or checkpoint)
    arguments = export_arguments(run / "download.json", run / "grpo/train.json", folder)
    call(monkeypatch, export.main, [*arguments, "--checkpoint", checkpoint])
    return folder


@pytest.mark.parametrize(("checkpoint", "rollout"), [("last", 3), ("best", 2), ("000001", 1)])
def test_the_weights_are_those_of_the_checkpoint(monkeypatch, run, capsys, checkpoint, rollout):
    folder = exported(monkeypatch, run, checkpoint)
    before, after = HubCheckpoint(run / "hub").read(NAME), HubCheckpoint(folder).read(NAME)
    assert before.abs().max() > 0
    assert after.equal((before.float() * (1 + rollout)).to(before.dtype))
    assert read_manifest(f"{folder}.json").facts["checkpoint"] == f"checkpoint-00000{rollout}"
    bias = "grpo@best is checkpoint-000002, 60.0% on aime, the best of 3 validations."
    assert (bias in capsys.readouterr().err) == (checkpoint == "best")


def test_another_best_checkpoint_is_exported_again_and_the_same_one_is_not(monkeypatch, run, capsys):
    trained = run / "grpo/train.json"
    before = trained.read_text()
    arguments = [*job_arguments({}, versions={}), "--hub", str(run / "download.json"), "--weights", str(trained)]
    arguments += ["--checkpoint", "best", "--folder", str(run / "again"), "--manifest", str(run / "again.json")]
    for best, is_new in (("checkpoint-000002", True), ("checkpoint-000002", False), ("checkpoint-000001", True)):
        trained.write_text(before.replace('"checkpoint": "checkpoint-000002"', f'"checkpoint": "{best}"'))
        call(monkeypatch, export.main, arguments)
        assert read_manifest(run / "again.json").facts["checkpoint"] == best
        assert ("nothing to export" in capsys.readouterr().err) != is_new
    trained.write_text(before)


def test_a_damaged_checkpoint_is_not_exported(monkeypatch, run):
    file = next((run / "grpo/work/checkpoint-000001/weights").glob("*.distcp"))
    whole = flip_a_bit(file)
    with pytest.raises(UserError, match=r"checkpoint-000001/weights/\S+: its sha256 is not the one in"):
        exported(monkeypatch, run, "000001", "damaged")
    file.write_bytes(whole)
