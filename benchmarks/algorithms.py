"""What replaced and carried groups are worth: train the tiny model in each way with several seeds, and record scores.

    PYTHONPATH=workflow_scripts python benchmarks/algorithms.py --folder comparison

It takes a quarter of an hour on two cores. Run again, it goes on where it was stopped. `make benchmark-tables` fills
the table of docs/algorithms.md. This script draws the picture there.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from record import record
from scipy.stats import t

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "algorithms.png"
# Each way of training, and the settings that it changes.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dynamic sampling": {"training": {"dynamic_sampling": True}},
    "carried over": {"sampling": {"over_sampling": 2.0}},
    "carried over, uncorrected": {"sampling": {"over_sampling": 2.0}, "algorithm": {"old_log_probs": "trainer"}},
}
COLORS = ("#8c959f", "#0b7285", "#1a7f64", "#c2410c")
INTERVAL = 10  # rollouts between validations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to keep the runs")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way")
    parser.add_argument("--rollouts", type=int, default=60, help="rollouts of each run")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = {way: [metrics(arguments, way, seed) for seed in range(1, arguments.seeds + 1)] for way in WAYS}
    for way, runs in found.items():
        for number in range(INTERVAL, arguments.rollouts + 1, INTERVAL):
            scores = [100 * run["validation_average"].get(number) for run in runs]
            record(
                "algorithm_accuracy",
                "tiny",
                mean(scores),
                "%",
                file="algorithms",
                way=way,
                rollout=number,
                half_width=round(half_width(scores), 2),
                runs=[round(score, 2) for score in scores],
                reward=round(mean(run["reward_mean"].get(number) for run in runs), 3),
                prompts=round(mean(drawn(run, number) for run in runs), 1),
                token_age=round(
                    mean(run["token_age_mean"].mean() if "token_age_mean" in run else 0 for run in runs), 2
                ),
            )
    draw(found).savefig(PICTURE, dpi=150, facecolor="white")


def metrics(arguments: argparse.Namespace, way: str, seed: int) -> pd.DataFrame:
    """A run's metrics by rollout; it is trained if it is not there yet."""
    name = f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    changes = json.loads(json.dumps(WAYS[way]))
    changes.setdefault("training", {}).update(seed=seed, rollouts=arguments.rollouts, save_interval=arguments.rollouts)
    changes["validation"] = {"interval": INTERVAL, "samples_per_problem": 8}
    subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "all"),
            *("--directory", arguments.folder, "--quiet", "all"),
            *("--config", "models=[tiny]", f"run={name}", f"per_model={json.dumps({'tiny': changes})}"),
            *("--", "train_tiny"),
        ],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    (file,) = (arguments.folder / "results/tiny/grpo" / name).glob("*/metrics.jsonl")
    rows = pd.DataFrame(map(json.loads, file.read_text().splitlines()))
    return rows.groupby("rollout").last()


def drawn(run: pd.DataFrame, number: int) -> float:
    """Prompts that the first ``number`` rollouts sampled responses to."""
    return run["prompts_begun"].loc[1:number].sum() if "prompts_begun" in run else 32 * number


def age(run: pd.DataFrame) -> float:
    """The mean age of a run's tokens, in rollouts."""
    return run["token_age_mean"].mean() if "token_age_mean" in run else 0.0


def half_width(values: list[float]) -> float:
    """Half of the 95% t interval of a mean over runs."""
    if len(values) < 2:
        return float("nan")
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def draw(found: dict[str, list[pd.DataFrame]]) -> Figure:
    """The validation score over rollouts: the mean of each way's runs, and the range that they span."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for (way, runs), color in zip(found.items(), COLORS, strict=True):
        scores = pd.concat([run["validation_average"].dropna() for run in runs], axis=1)
        axes.plot(scores.index, 100 * scores.mean(axis=1), color=color, linewidth=2, label=way)
        low, high = 100 * scores.min(axis=1), 100 * scores.max(axis=1)
        axes.fill_between(scores.index, low, high, color=color, alpha=0.15)
    axes.set(xlabel="rollout", ylabel="validation, % right")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    return figure


if __name__ == "__main__":
    main()
