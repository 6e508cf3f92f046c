"""GRPO over several processes: every layout has the gradient of one process, and a stopped run resumes."""

import json
import subprocess

import pytest
import torch
import torch.distributed as dist

import grpo_run
from distributed.grpo_worker import LAYOUTS, save_gradients, shapes_of
from milepost.checkpoints import torch_dist
from milepost.checkpoints.manifest import read_manifest
from milepost.common.errors import USER_ERROR
from milepost.configuration.schema import Parallel
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, finalize, initialize
from precision import MARGIN, assert_as_precise, computing_in
from stages import kill_the_second_rank, launcher, script, torchrun, torchrun_until, unmeasured
from tiny_hub import DENSE, EXPERTS, EXPERTS_PER_TOKEN, MOE, make_tiny_hub

HALF_THE_DIGITS = torch.finfo(torch.float64).eps ** 0.5
EPS = torch.finfo(torch.float32).eps


def gradients(folder, hub, dtype):
    initialize()
    with computing_in(dtype):
        model = build_model(Architecture.from_folder(hub), dtype=dtype, mtp_num_layers=1)
    torch_dist.load(model, folder)
    finalize()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def layouts(root, tmp_path_factory, environment):
    """A folder in which two processes have left the gradients and metrics of every layout, in float64."""
    folder = tmp_path_factory.mktemp("layouts")
    for kind in (DENSE, MOE):
        make_tiny_hub(folder / kind, kind)
    torchrun(2, str(root / "tests" / "distributed" / "grpo_worker.py"), str(folder), env=environment)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_has_the_loss_and_the_gradient_of_one_process(layouts, kind):
    hub, alone = layouts / kind.split()[-1], layouts / kind / "alone"
    save_gradients(hub, kind, Parallel(), layouts / kind / "rounded", torch.float32)
    save_gradients(hub, kind, Parallel(), alone)
    dist.destroy_process_group()

    rounded, exact = gradients(layouts / kind / "rounded", hub, torch.float32), gradients(alone, hub, torch.float64)
    (metrics,) = unmeasured(alone.with_suffix(".json"))
    packs, tokens = metrics.pop("packs"), sum(map(sum, shapes_of(kind)))
    for number, layout in enumerate(LAYOUTS[kind]):
        folder = layouts / kind / f"layout-{number}"
        assert_as_precise(gradients(folder, hub, torch.float64), rounded, exact)
        (reported,) = unmeasured(folder.with_suffix(".json"))
        # The two share each pack, or all of them.
        assert layout == Parallel() or reported["packs"] < packs or packs == 1, layout
        for name, value in metrics.items():
            # Layouts differ in padding, which visits experts too: up to a token per pack, half an expert's mean each.
            of_experts = name.startswith(("expert", "routing"))
            rel = packs * EXPERTS / EXPERTS_PER_TOKEN / tokens if of_experts else HALF_THE_DIGITS
            assert reported[name] == pytest.approx(value, rel=rel, abs=HALF_THE_DIGITS), (layout, name)


@pytest.mark.slow
def test_two_processes_train_as_one_does(root, tmp_path, environment):
    """Rank 0 samples for both; what they log is what one process logs, but for rounding."""
    grpo_run.prepare(tmp_path)
    grpo_run.convert_model(tmp_path)
    alone = grpo_run.arguments(tmp_path, tmp_path / "one", training={"rollouts": 2})
    both = grpo_run.arguments(tmp_path, tmp_path / "two", training={"rollouts": 2}, hardware={"processes": 2})
    grpo_run.run(alone)
    worker = root / "tests" / "distributed" / "slow_engine_worker.py"
    torchrun(2, str(worker), str(tmp_path / "engine runs"), *both, env=environment)
    read_manifest(tmp_path / "two.json").require(digests=True)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["rollout"] for row in two] == [row["rollout"] for row in one]
    # The samples are the same, their gradient is summed in another order; a rank's part is more than a thousandth.
    assert two[1]["reward_mean"] == one[1]["reward_mean"]
    assert two[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-3)
    for name in ("loss", "log_prob_diff"):  # both are rounding alone
        assert abs(two[1][name]) < MARGIN * max(abs(one[1][name]), EPS), name
    checkpoint = tmp_path / "two" / "checkpoint-000002"
    assert {path.name for path in (checkpoint / "optimizer").iterdir()} == {
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }

    # The same again, but the second rank is killed during the run.
    killed = grpo_run.arguments(
        tmp_path,
        tmp_path / "killed",
        training={"rollouts": 2, "save_interval": 1},
        hardware={"processes": 2},
    )
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


@pytest.mark.slow
def test_two_processes_of_a_job_for_one_are_refused(tmp_path, environment):
    grpo_run.prepare(tmp_path)
    grpo_run.convert_model(tmp_path)
    command = [*launcher(2), script("train"), *grpo_run.arguments(tmp_path, tmp_path / "run", parallel={"tensor": 2})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    *_, line = done.stderr.splitlines()
    assert done.returncode == USER_ERROR and "Traceback" not in done.stderr
    assert line.startswith("error: hardware.processes: 2 training processes were started, but 1 are configured")
    assert line.endswith("or set hardware.processes: 2")
