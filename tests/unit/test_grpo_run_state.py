"""Run states are complete or absent, damaged ones are skipped, and old ones go only after a new one is saved."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from milepost.common.errors import UserError
from milepost.grpo import run_state
from milepost.grpo.cpu_optimizer import CpuAdam
from milepost.grpo.metrics import METRICS, SAMPLES, JsonLines, truncate_logs
from milepost.grpo.run_state import Progress
from milepost.qwen3_5.build import build_model, finalize, initialize
from qwen3_5_reference import reference
from settings import section
from stages import flip_a_bit


@pytest.fixture(scope="module")
def trained():
    """A tiny model and its optimizer, one step old."""
    initialize()
    architecture, _ = reference("dense", hidden_size=64, intermediate_size=32, vocab_size=64)
    model = build_model(architecture, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    optimizer = CpuAdam(model, section("optimizer"))
    step(model, optimizer)
    yield model, optimizer
    finalize()


def step(model, optimizer):
    optimizer.zero_grad()
    sum((parameter * parameter).sum() for parameter in model.parameters()).backward()
    optimizer.step(1e-2)


def save(work, rollout, trained, score=None, **protocol):
    return run_state.save(work, Progress(rollout=rollout, score=score, protocol=protocol), *trained, {"config": {}})


def names(work):
    return sorted(path.name for path in work.iterdir())


def test_stored_tensors_are_read_one_at_a_time(tmp_path):
    """A checkpoint's optimizer states fill half of a node's memory, and the optimizer holds its own already."""
    tensors = {f"state.{number}": torch.full((2**22,), float(number)) for number in range(12)}  # 16 MiB each
    save_file(tensors, tmp_path / "states.safetensors")
    before, most = anonymous_memory(), 0
    stored = run_state.StoredTensors(tmp_path / "states.safetensors")
    assert set(stored) == set(tensors) and len(stored) == 12 and "other" not in stored
    for name, expected in tensors.items():
        assert name in stored and torch.equal(stored[name], expected)
        most = max(most, anonymous_memory() - before)
    assert most < 4 * 2**24
    with pytest.raises(KeyError):
        stored["other"]


def anonymous_memory() -> int:
    """This process's memory in bytes, without mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, trained):
    model, optimizer = trained
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: value.clone() for name, value in optimizer.state_dict().items()}
    cursor, protocol = {"epoch": 1, "position": 3, "prompts": 9}, {"temperature": 0.6}
    progress = Progress(20, 19, 1, 0, cursor, {METRICS: 7}, 0.25, protocol)
    folder = run_state.save(tmp_path, progress, model, optimizer, {})
    draw = torch.rand(3)

    step(model, optimizer)
    assert run_state.load(folder, model, optimizer) == progress
    assert torch.equal(torch.rand(3), draw)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert all(torch.equal(value, moments[name]) for name, value in optimizer.state_dict().items())


def test_an_interrupted_save_leaves_the_last_checkpoint_the_newest(tmp_path, trained, monkeypatch):
    save(tmp_path, 1, trained)
    monkeypatch.setattr(run_state, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        save(tmp_path, 2, trained)
    monkeypatch.undo()
    assert run_state.newest(tmp_path).name == "checkpoint-000001"
    save(tmp_path, 2, trained)
    assert run_state.newest(tmp_path).name == "checkpoint-000002"
    run_state.prune(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]


@pytest.mark.parametrize("damage", ["flipped bit", "cut file", "missing file"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, trained, damage, capsys):
    save(tmp_path, 1, trained)
    victim = save(tmp_path, 2, trained) / "optimizer" / "rank-00000.safetensors"
    if damage == "missing file":
        victim.unlink()
    elif damage == "cut file":
        victim.write_bytes(victim.read_bytes()[:-1])
    else:
        flip_a_bit(victim)
    assert run_state.newest(tmp_path).name == "checkpoint-000001"
    assert "checkpoint-000002 is damaged" in capsys.readouterr().err
    save(tmp_path, 2, trained)
    assert run_state.newest(tmp_path).name == "checkpoint-000002"


def test_pruning_keeps_the_last_and_the_best(tmp_path, trained):
    for rollout, score in ((1, 0.2), (2, 0.9), (3, 0.9), (4, None), (5, 0.1)):
        save(tmp_path, rollout, trained, score)
        run_state.prune(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000005"]
    assert run_state.best(tmp_path).name == "checkpoint-000002"
    save(tmp_path, 6, trained, 0.05, max_response_tokens=8)  # harder, so its scores are others
    assert run_state.best(tmp_path).name == "checkpoint-000006"


def test_a_run_is_not_resumed_by_another_number_of_processes(tmp_path, trained):
    folder = save(tmp_path, 1, trained)
    shutil.copy(folder / "optimizer" / "rank-00000.safetensors", folder / "optimizer" / "rank-00001.safetensors")
    with pytest.raises(UserError, match="saved by 2 processes: resume with as many, not 1"):
        run_state.load(folder, *trained)


def test_logs_are_truncated_to_their_length_in_the_checkpoint(tmp_path):
    log = JsonLines(tmp_path / METRICS)
    log.append({"rollout": 1, "loss": float("nan")})
    seen = log.sync()
    log.append({"rollout": 2})
    log.close()
    truncate_logs(tmp_path, {METRICS: seen})
    assert json.loads((tmp_path / METRICS).read_text()) == {"rollout": 1, "loss": None}
    assert (tmp_path / SAMPLES).read_bytes() == b""
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        truncate_logs(tmp_path, {METRICS: seen + 1})
