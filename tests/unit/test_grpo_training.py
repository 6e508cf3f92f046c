"""Whole trainings of a tiny random model: however one is stopped, it resumes as if it had not been."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import grpo_run
from milepost.checkpoints.manifest import describe, read_manifest
from milepost.common.errors import USER_ERROR, UserError
from milepost.grpo import run_state
from milepost.grpo.learner import Learner
from milepost.qwen3_5.build import finalize
from milepost.rewards.base import Verdict
from milepost.rollout.cpu_engine import CpuEngine
from stages import flip_a_bit, unmeasured

GRADINGS_BEFORE_ROLLOUT_4 = 5  # validation, rollouts 1 and 2, validation, rollout 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A model, its conversion, and one training from beginning to end."""
    folder = grpo_run.prepare(tmp_path_factory.mktemp("grpo"))
    grpo_run.convert_model(folder)
    grpo_run.run(grpo_run.arguments(folder, folder / "straight"))
    return folder


def ended(command_line, hook=None):
    """The exit status of a training that ends early."""
    with pytest.raises(SystemExit) as stopped:
        grpo_run.run(command_line, hook)
    finalize()
    return stopped.value.code


def mistake(command_line, hook=None):
    """The error line of a training that ends with a user's mistake."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert ended(command_line, hook) == USER_ERROR
    return said.getvalue().strip().splitlines()[-1]


def lines(work, name="metrics.jsonl"):
    return [json.loads(line) for line in (work / name).read_text().splitlines()]


def assert_same_run(one: Path, other: Path):
    assert unmeasured(one / "metrics.jsonl") == unmeasured(other / "metrics.jsonl")
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    checkpoints = [run_state.newest(work) for work in (one, other)]
    assert checkpoints[0].name == checkpoints[1].name
    for part in ("weights/__0_0.distcp", "optimizer/rank-00000.safetensors"):
        assert (checkpoints[0] / part).read_bytes() == (checkpoints[1] / part).read_bytes(), part


def test_a_training_leaves_what_its_manifest_promises(prepared):
    manifest = read_manifest(prepared / "straight.json").require(digests=True)
    assert manifest.kind == "train" and manifest.facts["rollouts"] == 4
    assert (manifest.root / manifest.facts["weights"]).is_dir()
    assert manifest.facts["best"]["checkpoint"] in ("checkpoint-000002", "checkpoint-000004")

    rollouts = [line for line in lines(manifest.root) if "reward_mean" in line]
    validations = [line for line in lines(manifest.root) if "validation_average" in line]
    assert [line["rollout"] for line in rollouts] == [1, 2, 3, 4]
    assert [line["rollout"] for line in validations] == [0, 2, 4]
    wanted = {
        *("reward_mean", "pass_rate", "response_length_mean", "truncated_share", "clip_fraction", "grad_norm", "loss"),
        *("learning_rate", "log_prob_diff", "groups_without_spread", "tokens_per_second", "bad_steps"),
        *("seconds_rollout", "seconds_train", "seconds_sync", "seconds_step"),
    }
    assert wanted <= set(rollouts[0])
    sample = lines(manifest.root, "samples.jsonl")[0]
    assert {"rollout", "prompt", "response", "label", "reward"} <= set(sample)
    assert list((manifest.root / "tensorboard").iterdir())


def log_prob_differences(work):
    return [line["log_prob_diff"] for line in lines(work) if "reward_mean" in line]


def test_engine_and_trainer_compute_the_same_model_after_every_step(prepared, tmp_path, monkeypatch):
    """They differ by rounding: of fp32, and of bf16 once the weights have left the Hub's own values."""
    first, *others = log_prob_differences(prepared / "straight")
    assert first < max(others) / 100, "engine and trainer compute different models"  # fp32 is 2^16 times as fine
    monkeypatch.setattr(CpuEngine, "load_weights", lambda engine, named: None)
    grpo_run.run(grpo_run.arguments(prepared, tmp_path / "stale", training={"rollouts": 2}))
    _, stale = log_prob_differences(tmp_path / "stale")
    assert max(others) < stale / 10, "the engine samples from weights that the trainer left behind"


def test_a_killed_training_resumes_exactly(prepared, tmp_path):
    """Killed in rollout 4, a rollout after the last checkpoint, it repeats rollout 3 and ends up bit for bit equal."""
    command_line = grpo_run.arguments(prepared, tmp_path / "run")
    grpo_run.run_until_killed(command_line, GRADINGS_BEFORE_ROLLOUT_4)
    assert [line["rollout"] for line in lines(tmp_path / "run")][-1] == 3
    assert run_state.newest(tmp_path / "run").name == "checkpoint-000002"
    grpo_run.run(command_line)
    assert_same_run(tmp_path / "run", prepared / "straight")


@pytest.mark.parametrize(
    ("grading", "saved"),
    [(GRADINGS_BEFORE_ROLLOUT_4, 3), (3, 2), (GRADINGS_BEFORE_ROLLOUT_4 + 1, 4)],
    ids=["in a rollout", "in a validation", "in the last validation"],
)
def test_a_training_that_is_asked_to_end_saves_itself_and_resumes_exactly(prepared, tmp_path, grading, saved):
    command_line = grpo_run.arguments(prepared, tmp_path / "run")

    def ask_to_end(gradings):
        if gradings == grading:
            os.kill(os.getpid(), signal.SIGTERM)

    assert ended(command_line, ask_to_end) == 128 + signal.SIGTERM
    assert run_state.newest(tmp_path / "run").name == f"checkpoint-{saved:06d}"
    assert not (tmp_path / "run.json").exists()
    grpo_run.run(command_line)
    assert_same_run(tmp_path / "run", prepared / "straight")


@pytest.mark.parametrize(
    ("grading", "saved"), [(GRADINGS_BEFORE_ROLLOUT_4, 3), (3, 2)], ids=["in a rollout", "in a validation"]
)
def test_a_training_whose_engine_or_grader_fails_saves_what_it_has(prepared, tmp_path, capsys, grading, saved):
    command_line = grpo_run.arguments(prepared, tmp_path / "run")

    def fail(gradings):
        if gradings == grading:
            raise UserError("the servers are out of breath")

    assert ended(command_line, fail) == USER_ERROR
    told, said = "warning: the servers are out of breath: the run is saved", capsys.readouterr().err
    assert said.endswith("\nerror: the servers are out of breath\n")
    assert (
        0 <= said.find(told) < said.find("stopped after")
    )  # the reason is told before a save that may take minutes, or fail
    assert run_state.newest(tmp_path / "run").name == f"checkpoint-{saved:06d}"
    grpo_run.run(command_line)
    assert_same_run(tmp_path / "run", prepared / "straight")


def test_running_out_of_gpu_memory_is_one_line_and_loses_no_checkpoint(prepared, tmp_path):
    command_line = grpo_run.arguments(prepared, tmp_path / "run")

    def run_out(gradings):
        if gradings == GRADINGS_BEFORE_ROLLOUT_4:
            raise torch.OutOfMemoryError("CUDA out of memory. 64 MiB are free. Of the allocated memory 1 is")

    said = mistake(command_line, run_out)
    assert re.fullmatch(
        r"error: rank 0: CUDA out of memory\. 64 MiB are free\. \(milepost/grpo/\w+\.py, line \d+\): lower"
        r" training\.max_tokens_per_gpu or engine\.mem_fraction_static and run again; .*",
        said,
    )
    grpo_run.run(command_line)
    assert_same_run(tmp_path / "run", prepared / "straight")


def test_a_finished_training_goes_on_when_rollouts_grow_and_refuses_when_they_shrink(prepared, tmp_path):
    work = tmp_path / "run"
    grpo_run.run(grpo_run.arguments(prepared, work, training={"rollouts": 3}))
    grpo_run.run(grpo_run.arguments(prepared, work))
    assert_same_run(work, prepared / "straight")
    (tmp_path / "run.json").unlink()
    grpo_run.run(grpo_run.arguments(prepared, work))  # only its manifest is written again
    read_manifest(tmp_path / "run.json").require(digests=True)
    assert "holds 4 rollouts, training.rollouts is 3" in mistake(
        grpo_run.arguments(prepared, work, training={"rollouts": 3})
    )


def test_another_validation_protocol_evaluates_again_and_ignores_old_scores(prepared, tmp_path):
    work = tmp_path / "run"
    grpo_run.run(grpo_run.arguments(prepared, work))
    grpo_run.run(grpo_run.arguments(prepared, work, validation={"samples_per_problem": 1}))
    validations = [line for line in lines(work) if "validation_average" in line]
    assert [line["rollout"] for line in validations] == [0, 2, 4, 4]
    best = read_manifest(tmp_path / "run.json").facts["best"]
    assert best == {"checkpoint": "checkpoint-000004", "score": validations[-1]["validation_average"]}


def test_too_many_bad_steps_save_the_run_and_end_it(prepared, tmp_path, monkeypatch, capsys):
    """Three good rollouts, of which the last is not due for a save, and then two whose step is not finite."""
    learn, work = Learner.learn, tmp_path / "run"

    def go_wrong(learner, sequences, progress):
        bad = progress.rollout >= 3
        return learn(learner, [replace(s, advantage=math.nan) for s in sequences] if bad else sequences, progress)

    monkeypatch.setattr(Learner, "learn", go_wrong)
    settings = {"training": {"rollouts": 9, "max_bad_steps": 2}, "validation": {"interval": 0}}
    message = mistake(grpo_run.arguments(prepared, work, **settings))
    assert "2 steps in a row" in message and "saved (checkpoint-000005)" in message and "\n" not in message
    assert [line["loss"] for line in lines(work)][3:] == [None, None]
    saved = run_state.newest(work)
    assert saved.name == "checkpoint-000005"

    monkeypatch.undo()
    grpo_run.run(grpo_run.arguments(prepared, tmp_path / "good", training={"rollouts": 3}, validation={"interval": 0}))
    for part in ("weights/__0_0.distcp", "optimizer/rank-00000.safetensors"):
        good = run_state.newest(tmp_path / "good") / part
        assert (saved / part).read_bytes() == good.read_bytes(), part

    grpo_run.run(grpo_run.arguments(prepared, work, training={"rollouts": 6}, validation={"interval": 0}))
    assert lines(work)[-1]["rollout"] == 6 and lines(work)[-1]["loss"] is not None


@pytest.mark.parametrize("reward", [0, 1])
def test_equal_rewards_are_reported_once_with_three_answers(prepared, tmp_path, monkeypatch, capsys, reward):
    """The run is stopped and goes on within its first rollouts."""
    reasons = itertools.cycle(["no_box", "no_box", "no_think_end"])
    verdicts = lambda grader, responses: [Verdict(float(reward), None, next(reasons)) for _ in responses]  # noqa: E731
    monkeypatch.setattr(grpo_run.FixedReward, "grade", verdicts)
    work, told = tmp_path / "run", f"warning: every reward of rollouts 1 to 3 is {reward}, and equal rewards"
    for rollouts in (1, 5, 6):
        grpo_run.run(grpo_run.arguments(prepared, work, training={"rollouts": rollouts}, validation={"interval": 0}))
    said = capsys.readouterr().err
    assert said.count(told) == 1
    shown = [line for line in said[said.index(told) :].splitlines()[1:] if " line " in line.partition(",")[0]]
    assert len(shown) == 3 and all("label '" in line and "the response ends" in line for line in shown)
    assert "no_box" in shown[0] and "no_think_end" in shown[1]
    assert len(lines(work)) == 6


def test_rewards_that_differ_in_the_first_rollouts_give_no_warning(prepared, tmp_path, capsys):
    grpo_run.run(grpo_run.arguments(prepared, tmp_path / "run"))
    assert "every reward" not in capsys.readouterr().err


def test_prompts_that_training_shares_with_the_validation_are_reported(prepared, tmp_path, capsys):
    command_line = grpo_run.arguments(prepared, tmp_path / "run", training={"rollouts": 1})
    grpo_run.run(command_line)
    assert "as well" not in capsys.readouterr().err
    same = [part.replace("evaluation.json", "train.json") for part in command_line]
    grpo_run.run([part.replace("run", "other") for part in same])
    assert "warning: 7 of the 7 prompts of train are in the training set train as well" in capsys.readouterr().err


def test_a_flipped_bit_in_the_starting_weights_is_found_and_named(prepared, tmp_path):
    file = next(file for file in (prepared / "torch_dist").iterdir() if file.suffix == ".distcp")
    whole = flip_a_bit(file)
    try:
        assert f"{file.name}: its sha256 is not the one" in mistake(grpo_run.arguments(prepared, tmp_path / "work"))
    finally:
        file.write_bytes(whole)


def test_a_run_resumes_only_with_the_prompts_that_it_began_with(prepared, tmp_path):
    rows, manifest = prepared / "train" / "rows.jsonl", prepared / "train.json"
    grpo_run.run(grpo_run.arguments(prepared, tmp_path / "run", training={"rollouts": 2}))
    was, vouched = rows.read_text(), manifest.read_text()
    try:
        rows.write_text(was.replace("What is 10", "What is 11", 1))
        assert "its sha256 is not the one" in mistake(grpo_run.arguments(prepared, tmp_path / "other"))
        content = json.loads(vouched)
        content["files"]["rows.jsonl"] = describe(rows)
        manifest.write_text(json.dumps(content))
        message = mistake(grpo_run.arguments(prepared, tmp_path / "run"))
        assert "begun with prompts that have changed" in message and "move that folder away" in message
    finally:
        rows.write_text(was)
        manifest.write_text(vouched)
    partial = tmp_path / "run" / ".checkpoint-000003.partial"  # a save that was killed; the next one wants its room
    partial.mkdir()
    grpo_run.run(grpo_run.arguments(prepared, tmp_path / "run", training={"rollouts": 2}))
    assert not partial.exists()


def test_weights_and_biases_without_its_package_is_an_error_in_one_line(prepared, tmp_path):
    message = mistake(grpo_run.arguments(prepared, tmp_path / "run", training={"wandb_project": "mine"}))
    assert message.startswith("error: training.wandb_project") and "\n" not in message


def test_a_job_for_two_processes_is_refused_by_one(prepared, tmp_path):
    message = mistake(grpo_run.arguments(prepared, tmp_path / "run", hardware={"processes": 2}))
    assert message.startswith("error: hardware.processes: 1 training processes were started, but 2 are configured")
    assert not (tmp_path / "run").exists()
