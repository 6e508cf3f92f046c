"""Rollouts that are saved whole, and trained on again without an engine."""

import json

import pytest
from test_grpo_training import mistake

import grpo_run
import train
from milepost.common.errors import UserError
from milepost.configuration.loading import load
from milepost.configuration.provenance import Provenance
from milepost.configuration.runs import ROLLOUTS, identity
from milepost.grpo import run_state

NO_VALIDATION = {"validation": {"interval": 0}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A training that saves its rollouts."""
    folder = grpo_run.prepare(tmp_path_factory.mktemp("replay"))
    grpo_run.convert_model(folder)
    grpo_run.run(grpo_run.arguments(folder, folder / "run", training={"save_rollouts": True}, **NO_VALIDATION))
    return folder


def again(prepared, work, rollouts=4, **changes):
    training = {
        "mode": "train_only",
        "replay": str(prepared / "run"),
        "rollouts": rollouts,
        **changes.pop("training", {}),
    }
    return grpo_run.arguments(prepared, work, training=training, **NO_VALIDATION, **changes)


def rows(work):
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


def weights(work):
    return (run_state.newest(work) / "weights/__0_0.distcp").read_bytes()


def no_engine(*_, **__):
    raise AssertionError("an engine was started")


def test_the_same_settings_on_the_same_rollouts_give_the_same_weights(prepared, tmp_path, monkeypatch):
    """With the trainer's old log-probs, as in the run itself, every step is the same, bit for bit."""
    monkeypatch.setattr(train, "start_engine", no_engine)
    grpo_run.run(again(prepared, tmp_path / "again", algorithm={"old_log_probs": "trainer"}))
    assert weights(tmp_path / "again") == weights(prepared / "run")
    for then, now in zip(rows(prepared / "run"), rows(tmp_path / "again"), strict=True):
        assert all(then[name] == now[name] for name in ("reward_mean", "loss", "grad_norm", "response_length_mean"))


def test_another_loss_is_compared_on_the_same_rollouts(prepared, tmp_path):
    grpo_run.run(again(prepared, tmp_path / "other", algorithm={"advantage": "dr_grpo"}))
    assert weights(tmp_path / "other") != weights(prepared / "run")
    then, now = rows(prepared / "run"), rows(tmp_path / "other")
    assert [row["reward_mean"] for row in now] == [row["reward_mean"] for row in then]
    assert now[0]["ratio"] == pytest.approx(1.0, abs=1e-5) and now[-1]["fresh_share"] == 0.0


def test_rollouts_alone_leave_the_weights_as_they_are_and_can_be_trained_on(prepared, tmp_path):
    grpo_run.run(
        grpo_run.arguments(
            prepared, tmp_path / "drawn", training={"mode": "rollout_only", "rollouts": 2}, **NO_VALIDATION
        )
    )
    assert len(list((tmp_path / "drawn" / ROLLOUTS).iterdir())) == 2
    saved = run_state.newest(tmp_path / "drawn")
    assert run_state.read_progress(saved).optimizer_step == 0
    first = [(tmp_path / "drawn" / ROLLOUTS / "000001.safetensors").read_bytes()]
    assert first == [(prepared / "run" / ROLLOUTS / "000001.safetensors").read_bytes()]
    replayed = {"training": {"mode": "train_only", "replay": str(tmp_path / "drawn"), "rollouts": 2}}
    grpo_run.run(grpo_run.arguments(prepared, tmp_path / "trained", **replayed, **NO_VALIDATION))
    assert run_state.read_progress(run_state.newest(tmp_path / "trained")).optimizer_step == 2


def test_rollouts_that_are_not_there_are_a_mistake_in_one_line(prepared, tmp_path):
    said = mistake(again(prepared, tmp_path / "long", rollouts=5))
    assert "000005.safetensors: no such rollout: lower training.rollouts" in said
    smaller = {"samples_per_prompt": 2, "global_batch": 6}
    assert "holds 3 x 4 samples: set training" in mistake(again(prepared, tmp_path / "small", training=smaller))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"mode": "train_only"}}, "train_only and replay belong together"),
        ({"training": {"replay": "there"}}, "train_only and replay belong together"),
        (
            {"training": {"mode": "train_only", "replay": "there"}},
            "no engine to validate with: set validation",
        ),
    ],
)
def test_settings_that_do_not_fit_a_replay_are_refused(root, changes, said):
    with pytest.raises(UserError, match=said):
        load(root / "config/config.yaml", root / "config/models", {"models": ["9B"], **changes})


def test_other_rollouts_than_before_are_another_training(root, prepared, tmp_path):
    (tmp_path / "run" / ROLLOUTS).mkdir(parents=True)

    def replayed(rollouts):
        user = {
            "training": {"mode": "train_only", "replay": str(tmp_path / "run"), "rollouts": rollouts},
            "validation": {"interval": 0},
        }
        configuration = load(root / "config/config.yaml", root / "config/models", user)
        job = Provenance(configuration, root / "workflow_scripts").of("train", model="9B") | {"inputs": {}}
        return identity(job)["config"]["replayed"]

    empty = replayed(2)
    for name in ("000001.safetensors", "000003.safetensors"):
        (tmp_path / "run" / ROLLOUTS / name).write_bytes((prepared / "run" / ROLLOUTS / name).read_bytes())
    assert len({empty, replayed(2), replayed(3)}) == 3
    assert replayed(1) == replayed(2), "a rollout that is not trained on does not count"
