"""The progress page over trainings that still run, in the folders and logs that they leave."""

import json
import os
import time

import pytest

from milepost.checkpoints.manifest import write_manifest
from milepost.common.files import hold, write_json
from milepost.common.jobs import read_job
from milepost.configuration import runs
from milepost.reporting.plots import phase_seconds
from milepost.reporting.progress import progress_page, state
from milepost.reporting.results import read_trainings, read_unfinished
from settings import section

CONFIG = {
    "training": {"dataset": "sums", "rollouts": 100, "save_interval": 10},
    "validation": {"dataset": "others", "interval": 10},
    "optimizer": {"learning_rate": 1e-6},
    "reward": {},
}
SAMPLE = {
    **{"line": 1, "prompt": "<|im_start|>user\nWhat is 1 + 1?", "label": "2", "answer": None, "reward": 0.0},
    **{"reason": "no_box", "tokens": 12, "finish": "stop"},
}


@pytest.fixture
def begun(tmp_path):
    """``begun(rollouts)`` -> the manifest's path and the job file of a training that has done so many."""
    write_manifest(tmp_path / "download.json", "download", tmp_path, [], {})

    def make(rollouts, model="9B"):
        path, job = tmp_path / model / "grpo/grpo/train.json", tmp_path / "jobs" / model / "grpo/grpo/train.json"
        record = {"config": CONFIG, "code": "c", "versions": {}, "commit": None, "on_code_change": "new"}
        write_json(job, record | {"upstream": {"download": str(tmp_path / "download.json")}})
        work = runs.open_run(path.parent, read_job(job))
        rows = [
            {"rollout": 0, "validation_average": 0.25, "validation_standard_error": 0.05, "seconds_validation": 30.0}
        ]
        for rollout in range(1, rollouts + 1):
            phases = {"seconds_rollout": 40.0, "seconds_train": 15.0, "seconds_sync": 3.0, "seconds_sleep_wake": 2.0}
            rows.append({"rollout": rollout, "reward_mean": 0.5, "seconds_step": 60.0} | phases)
        with (work / "metrics.jsonl").open("w") as log:
            log.write("".join(json.dumps(row) + "\n" for row in rows) + '{"rollout": 99, "rewa')
        with (work / "samples.jsonl").open("w") as log:
            for rollout in range(1, rollouts + 1):
                log.write(json.dumps(SAMPLE | {"rollout": rollout, "response": f"Response {rollout}."}) + "\n")
        return path, job, work

    return make


def test_a_training_that_runs_is_read_from_its_logs_while_its_lock_is_held(begun):
    path, job, work = begun(25)
    with hold(work):
        training = read_unfinished(path, job)
    assert (training.model, training.run, training.rollouts, training.is_finished) == ("9B", "grpo", 25, False)
    assert training.column("validation_average").to_dict() == {0: 0.25}
    page = progress_page([training], ["4B/grpo"], section("plots"))
    for text in ("25 <span", "of 100 rollouts", ">25.0%<", "none yet", "Response 25.", "No rollout yet: 4B/grpo"):
        assert text in page, text
    assert "Response 20." not in page  # only the newest
    for title in ("9B: reward", "9B: response length", "9B: where the time goes", "Validation scores of 9B/grpo"):
        assert f"<h3>{title}</h3>" in page


def test_the_time_that_is_left_includes_validations_and_a_silent_training_is_told(begun):
    path, job, work = begun(25)
    training, now = read_unfinished(path, job), time.time()
    os.utime(work / "metrics.jsonl", (now - 61, now - 61))
    # 75 steps of a minute and 8 validations of half a minute
    assert state(training, now).startswith("about 1 h 19 min left, until ")
    assert state(training, now).endswith("the last line was logged 1 min 1 s ago")
    os.utime(work / "metrics.jsonl", (now - 3600, now - 3600))
    assert state(training, now) == (
        "the last line was logged 1 h ago, and a step takes 1 min: it has stopped, or waits; 1 h 19 min would be left"
    )


def test_a_training_that_validates_for_long_is_not_taken_for_stopped(begun):
    path, job, work = begun(10)
    lines = (work / "metrics.jsonl").read_text().replace('"seconds_validation": 30.0', '"seconds_validation": 900.0')
    (work / "metrics.jsonl").write_text(lines)
    training, now = read_unfinished(path, job), time.time()
    for ago, stopped in ((1200, False), (1900, True)):
        os.utime(work / "metrics.jsonl", (now - ago, now - ago))
        assert ("it has stopped" in state(training, now)) == stopped


def test_what_has_not_begun_or_lacks_its_inputs_is_not_read(begun, tmp_path):
    path, job, work = begun(3)
    assert read_unfinished(path, tmp_path / "jobs/none.json") is None
    (work / "metrics.jsonl").unlink()
    assert read_unfinished(path, job) is None
    (tmp_path / "download.json").unlink()
    assert read_unfinished(path, job) is None
    assert "No rollout yet: 9B/grpo" in progress_page([], ["9B/grpo"], section("plots"))


def test_a_finished_training_says_so(begun):
    path, _, work = begun(25)
    facts = {"metrics": "metrics.jsonl", "samples": "samples.jsonl", "checkpoint": "checkpoint-000025"}
    write_manifest(path, "train", work, ["samples.jsonl"], {"config": CONFIG, "upstream": {}}, facts)
    (training,) = read_trainings([path])
    assert state(training, time.time()) == "finished"
    assert "of 25 rollouts" in progress_page([training], [], section("plots"))


def test_validations_and_checkpoints_have_their_share_of_a_step(begun):
    path, job, _ = begun(25)
    assert phase_seconds(read_unfinished(path, job)) == {
        **{"rollout": 40.0, "train": 15.0, "sync": 3.0, "sleep_wake": 2.0},
        "validation": 3.0,
    }


@pytest.mark.parametrize("block", [7, 64, 2**20])
def test_the_newest_samples_are_found_whatever_is_read_at_once(begun, monkeypatch, block):
    path, job, work = begun(9)
    monkeypatch.setattr("milepost.reporting.results.BLOCK", block)
    with (work / "samples.jsonl").open("a") as log:
        log.write('{"rollout": 10, "resp')  # being written
    found = read_unfinished(path, job).read_samples(3)
    assert [row["response"] for row in found] == [f"Response {rollout}." for rollout in (7, 8, 9)]
