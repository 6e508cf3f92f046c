"""What a run tells TensorBoard and Weights & Biases."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from milepost.grpo.metrics import RunLog, tag
from settings import training_settings


def read(work):
    events = EventAccumulator(str(work / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_has_metrics_in_groups_and_the_settings(tmp_path):
    log = RunLog(tmp_path, 1, training_settings(optimizer={"learning_rate": 2e-5}))
    log.metrics(1, {"reward_mean": 0.5, "reward_mean/sums": 0.25, "seconds_step": 9.0, "loss": 0.1, "entropy": 2.0})
    log.close()
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        *("reward/reward_mean", "reward/reward_mean/sums", "seconds/seconds_step", "loss/loss", "loss/entropy"),
    }
    (text,) = events.Tensors("settings/text_summary")
    assert b"learning_rate: 2.0e-05" in text.tensor_proto.string_val[0]


@pytest.mark.parametrize(
    ("metric", "group"),
    [
        ("pass_rate", "reward"),
        ("truncated_share", "length"),
        ("validation_truncated_share", "validation"),
        ("log_prob_diff", "engine"),
        ("kl", "loss"),
        ("expert_load_max", "experts"),
        ("gpu_memory_gib", "memory"),
    ],
)
def test_every_metric_has_a_group(metric, group):
    assert tag(metric) == f"{group}/{metric}"


@pytest.fixture
def wandb(monkeypatch):
    """A module in wandb's place that records what it is called with."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.started, module.logged, module.ended = [], [], []

    def init(**settings):
        module.started.append(settings)
        return SimpleNamespace(
            define_metric=lambda *_, **__: None, log=module.logged.append, finish=lambda: module.ended.append(1)
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_name_configuration_and_an_id_to_resume_by(tmp_path, wandb):
    work = tmp_path / "9B/grpo/first/0123456789ab"
    work.mkdir(parents=True)
    settings = training_settings(training={"wandb_project": "mine"}, optimizer={"learning_rate": 2e-5})
    for first_rollout in (1, 4):  # begun, and gone on with
        log = RunLog(work, first_rollout, settings)
        log.metrics(first_rollout, {"reward_mean": 0.5})
        log.close()
    first, second = wandb.started
    assert first == second
    assert (first["project"], first["id"], first["resume"]) == ("mine", "0123456789ab", "allow")
    assert first["name"] == "9B/first/0123456789ab"
    assert first["config"]["optimizer"]["learning_rate"] == 2e-5
    assert wandb.logged == [{"rollout": n, "reward/reward_mean": 0.5} for n in (1, 4)]
    assert len(wandb.ended) == 2
