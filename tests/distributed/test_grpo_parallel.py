"""GRPO over several processes: every layout has the gradient of one process, and a whole run goes on when stopped."""

import json

import pytest
import torch
import torch.distributed as dist

import grpo_run
from checkpoints import torch_dist
from checkpoints.manifest import read_manifest
from configuration.schema import Parallel
from distributed.grpo_worker import LAYOUTS, save_gradients
from qwen3_5.architecture import Architecture
from qwen3_5.build import build_model, finalize, initialize
from stages import kill_the_second_rank, torchrun, torchrun_until, unmeasured
from tiny_hub import make_tiny_hub


def gradients(folder, hub):
    initialize()
    model = build_model(Architecture.from_folder(hub), dtype=torch.float32, mtp_num_layers=1)
    torch_dist.load(model, folder)
    finalize()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_has_the_loss_and_the_gradient_of_one_process(root, tmp_path, environment, kind):
    hub = tmp_path / "hub"
    make_tiny_hub(hub, kind.split()[-1])
    worker = root / "tests" / "distributed" / "grpo_worker.py"
    torchrun(2, str(worker), str(hub), kind, str(tmp_path), env=environment)
    save_gradients(hub, kind, Parallel(), tmp_path / "alone")
    dist.destroy_process_group()

    expected, (metrics,) = gradients(tmp_path / "alone", hub), unmeasured(tmp_path / "alone.json")
    packs = metrics.pop("packs")
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for number, layout in enumerate(LAYOUTS[kind]):
        found = gradients(tmp_path / f"layout-{number}", hub)
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm()
            assert error < 1e-3 * gradient.norm() + 1e-6 * norm, f"{layout}: {name}"
        (reported,) = unmeasured(tmp_path / f"layout-{number}.json")
        # The two share each pack, or all of them.
        assert layout == Parallel() or reported["packs"] < packs or packs == 1, layout
        for name, value in metrics.items():
            # Padding, of which layouts differ, visits experts too.
            rel = 0.05 if name.startswith(("expert", "routing")) else 1e-4
            assert reported[name] == pytest.approx(value, rel=rel, abs=1e-6), name


@pytest.mark.slow
def test_two_processes_train_as_one_does(root, tmp_path, environment):
    """Rank 0 samples for both; what they log is what one process logs, but for rounding."""
    grpo_run.prepare(tmp_path)
    grpo_run.convert_model(tmp_path)
    alone, both = (grpo_run.arguments(tmp_path, tmp_path / name, training={"rollouts": 2}) for name in ("one", "two"))
    grpo_run.run(alone)
    worker = root / "tests" / "distributed" / "slow_engine_worker.py"
    torchrun(2, str(worker), str(tmp_path / "engine runs"), *both, env=environment)
    read_manifest(tmp_path / "two.json").require(digests=True)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["rollout"] for row in two] == [row["rollout"] for row in one]
    for name in ("reward_mean", "loss", "grad_norm", "log_prob_diff"):
        assert two[1][name] == pytest.approx(one[1][name], rel=1e-3, abs=1e-6), name
    checkpoint = tmp_path / "two" / "checkpoint-000002"
    assert {path.name for path in (checkpoint / "optimizer").iterdir()} == {
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }

    # The same again, but the second rank is killed under way.
    killed = grpo_run.arguments(tmp_path, tmp_path / "killed", training={"rollouts": 2, "save_interval": 1})
    metrics = tmp_path / "killed" / "metrics.jsonl"
    status, _ = torchrun_until(
        lambda: metrics.exists() and '"loss"' in metrics.read_text(),
        kill_the_second_rank,
        str(root / "tests" / "grpo_run.py"),
        *killed,
        env=environment,
    )
    assert status != 0
    torchrun(2, str(root / "tests" / "grpo_run.py"), *killed, env=environment)
    read_manifest(tmp_path / "killed.json").require(digests=True)
    for name in ("samples.jsonl", *(f"checkpoint-000002/optimizer/rank-0000{rank}.safetensors" for rank in (0, 1))):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
