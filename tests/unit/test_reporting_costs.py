"""What the report says of time, hardware, data and batches."""

import subprocess
from pathlib import Path

import pytest

from milepost.checkpoints.manifest import read_manifest, write_manifest
from milepost.reporting.costs import costs
from milepost.reporting.report import report_page, training_facts
from milepost.reporting.results import pairs, read_scores
from recorded import BASE, TRAINED, rewards, score, training
from settings import section

JOB = Path(__file__).parents[2] / "rules/job.sh"
CONFIG = {
    "training": {"dataset": "sums", "prompts_per_rollout": 32, "samples_per_prompt": 8, "global_batch": 128},
    "optimizer": {"learning_rate": 2e-6},
    "hardware": {"gpus": 8},
}


def attempts(folder, job, *seconds):
    """Write the times of a job's attempts as rules/job.sh does."""
    log = folder / "logs/9B" / f"{job}.attempts.tsv"
    log.parent.mkdir(parents=True, exist_ok=True)
    total, lines = 0, ["began\thost\tstatus\tseconds\ttotal_seconds"]
    for number, one in enumerate(seconds):
        total += one
        lines.append(f"2026-11-2{number}T02:08:14+0000\tnode{number}\t0\t{one}\t{total}")
    log.write_text("\n".join(lines) + "\n")


@pytest.fixture
def done(tmp_path):
    """A training on eight GPUs and both scores, and the times of some of their jobs."""
    scores = read_scores([score(tmp_path, "base", BASE), score(tmp_path, "grpo", TRAINED)])
    steps = [row | {"seconds_step": 60.0} for row in rewards(*[0.5] * 120)]
    trained = training(tmp_path, steps, config=CONFIG)
    attempts(tmp_path, "download", 600)
    attempts(tmp_path, "train-grpo", 3600, 7200)
    attempts(tmp_path, "train-another", 9999)
    return scores, trained


def test_wall_time_and_gpu_hours_are_summed_over_the_attempts_of_each_job(done):
    scores, trained = done
    download, train, together = costs(scores, [trained])
    assert (download["job"], download["wall time"], download["GPU-hours"]) == ("9B/download", "10 min", "0")
    assert train == {
        "job": "9B/train-grpo",
        "last began": "2026-11-21 02:08",
        "host": "node0, node1",
        "attempts": "2",
        "wall time": "3 h",
        "GPUs": "8",
        "GPU-hours": "24",
    }
    assert (together["job"], together["wall time"], together["GPU-hours"]) == ("all", "3 h 10 min", "24")


def test_the_times_that_jobs_keep_are_read(done, tmp_path):
    """As rules/job.sh writes them, an attempt that failed included."""
    log = tmp_path / "logs/9B/evaluate-aime-grpo.log"
    for status in (1, 0):
        script = f'source "{JOB}"; begin "{log}"; exit {status}'
        subprocess.run(["bash", "-c", script], check=False, timeout=60)
    (row,) = [row for row in costs(done[0], []) if row["job"] == "9B/evaluate-aime-grpo"]
    assert row["attempts"] == "2" and row["GPUs"] == "0"


def test_a_training_says_what_it_was_asked_to_do(done):
    facts = dict(training_facts(done[1], {"sums": 2048}))
    assert facts["training sets"] == "sums (2,048 rows)"
    assert facts["epochs"] == "1.9 (3,840 prompts)"
    assert facts["batch"] == "32 prompts × 8 samples a rollout, 128 responses an optimizer step"
    assert facts["learning rate"] == "2e-06"
    assert facts["time in steps, validations and checkpoints"] == "2 h, 16 GPU-hours"
    assert "epochs" not in dict(training_facts(done[1]))


def test_the_page_names_date_commit_machine_times_and_data_sets(done, tmp_path):
    scores, trained = done
    scores[0].manifest.facts["machine"] = "8 NVIDIA H200, 128 cores"
    job = {"config": {"dataset": {"prompt_key": "question", "label_key": "sum", "file": "rows.jsonl"}}}
    facts = {"rows": 2048, "repo": "us/sums", "commit": "abc"}
    source = write_manifest(tmp_path / "sums.json", "download", tmp_path, [], job, facts)
    plots = write_manifest(tmp_path / "plots.json", "plots", tmp_path, [], {}, {"plots": []})
    page = report_page(scores, pairs(scores), [trained], plots, [read_manifest(source.path)], section("plots"))
    for text in (
        *("Made on 20", "run 9B/grpo", "commit c", "8 NVIDIA H200, 128 cores."),
        *("9B/train-grpo", "3 h 10 min", "sums (2,048 rows)"),
        *("us/sums at abc", "file: rows.jsonl; prompt_key: question; label_key: sum"),
    ):
        assert text in page, text
