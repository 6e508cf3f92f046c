"""Evaluations and trainings of 9B as their jobs record them, small enough to work out their figures by hand."""

import json
from pathlib import Path

from milepost.checkpoints.manifest import write_manifest
from milepost.reporting.results import Training, read_trainings

PROTOCOL = {
    "samples_per_problem": 2,
    "max_response_tokens": 4096,
    "temperature": 0.6,
    "top_p": 0.95,
    "top_k": -1,
    "presence_penalty": 0.0,
    "enable_thinking": True,
    "bootstrap_samples": 500,
    "seed": 1,
}
BASE = [[True, False], [False, False], [False, False], [True, False]]  # an average of 25%
TRAINED = [[True, True], [False, True], [False, True], [True, True]]  # of 75%, better by 50 points in every problem


def score(
    folder, weights, correct, config=None, facts=None, labels=("2", "4", "6", "8"), model="9B", dataset="aime"
) -> Path:
    """Write an evaluation of four problems, two samples each; ``config`` and ``facts`` replace what it says."""
    path = folder / model / "eval" / dataset / f"{weights}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"problem": p, "sample": s, "prompt": [{"role": "user", "content": f"Question {p}?"}]}
        | {"response": f"Response {p}.{s}.", "tokens": 7, "finish": "stop", "label": labels[p]}
        | {"answer": f"a{p}.{s}", "correct": correct[p][s], "reward": float(correct[p][s]), "reason": f"r{p}.{s}"}
        for p in range(4)
        for s in range(2)
    ]
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    average = sum(map(sum, correct)) / 8
    found = {
        "problems": 4,
        "samples_per_problem": 2,
        "prompts": "digest",
        "average": average,
        "interval": [average - 0.1, average + 0.1],
        "pass_at": {"1": average, "2": sum(map(any, correct)) / 4},
        "majority": 0.375,
        "truncated_share": 0.125,
        "no_think_end_share": 0.25,
        "no_box_share": 0.5,
        "grading_error_share": 0.0625,
        "mean_tokens": 1234.4,
        "per_problem": [
            {
                "label": label,
                "rewards": [float(c) for c in row],
                "correct": row,
                "answers": [f"a{p}.0", f"a{p}.1"],
                "reasons": [f"r{p}.0", f"r{p}.1"],
            }
            for p, (label, row) in enumerate(zip(labels, correct, strict=True))
        ],
    } | (facts or {})
    settings = {"evaluation": PROTOCOL, "engine": {"kind": "cpu"}, "reward": {"think_block": "required"}}
    provenance = {"config": settings | (config or {}), "code": "c", "upstream": {}}
    write_manifest(path, "evaluate", path.parent, [f"{weights}.jsonl"], provenance, found)
    return path


def training(folder, metrics, samples=(), best=None, run="grpo", config=None) -> Training:
    """Write a training with these lines in its logs, and read it."""
    work, path = folder / "9B/grpo" / run / "work", folder / "9B/grpo" / run / "train.json"
    work.mkdir(parents=True)
    (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (work / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    facts = {"metrics": "metrics.jsonl", "samples": "samples.jsonl", "best": best}
    facts |= {"rollouts": metrics[-1]["rollout"], "checkpoint": "checkpoint-last"}
    write_manifest(path, "train", work, ["metrics.jsonl"], {"config": config or {}, "code": "c", "upstream": {}}, facts)
    return read_trainings([path])[0]


def rewards(*values):
    return [{"rollout": rollout, "reward_mean": value} for rollout, value in enumerate(values, start=1)]
