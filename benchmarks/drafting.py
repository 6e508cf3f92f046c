"""Does training the MTP layer keep its drafts useful? Record and plot the acceptance of two runs of tiny_moe.

    snakemake --cores all --configfile benchmarks/drafting.yaml -- train_tiny_moe
    snakemake --cores all --configfile benchmarks/drafting.yaml \\
        --config run=frozen 'per_model={"tiny_moe": {"mtp": {"train": false}}}' -- train_tiny_moe
    PYTHONPATH=workflow_scripts python benchmarks/drafting.py \\
        results/tiny_moe/grpo/grpo/*/metrics.jsonl results/tiny_moe/grpo/frozen/*/metrics.jsonl
"""

import argparse
import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from record import record

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "drafting.png"
LAST = 5  # rollouts to average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, help="metrics of the run that trained the MTP layer")
    parser.add_argument("frozen", type=Path, help="metrics of the run that did not")
    arguments = parser.parse_args()
    runs = {name: metrics(getattr(arguments, name)) for name in ("trained", "frozen")}
    for name, run in runs.items():
        for figure, unit in (("acceptance_rate", "share"), ("acceptance_length", "tokens")):
            record(
                figure,
                "tiny_moe",
                run[figure].tail(LAST).mean(),
                unit,
                gpus=1,
                file="drafting",
                mtp=name,
                rollouts=len(run),
                first=round(run[figure].iloc[0], 4),
                reward=round(run["reward_mean"].tail(LAST).mean(), 3),
                log_prob_diff=round(run["log_prob_diff"].median(), 5),
            )
    draw(runs).savefig(PICTURE, dpi=150, facecolor="white")


def metrics(file: Path) -> pd.DataFrame:
    """A run's metrics by rollout, without validations."""
    rows = [row for row in map(json.loads, file.read_text().splitlines()) if "seconds_step" in row]
    return pd.DataFrame(rows).set_index("rollout")


def draw(runs: dict[str, pd.DataFrame]) -> Figure:
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    rate, loss = figure.subplots(1, 2)
    for (name, run), color in zip(runs.items(), ("#1a7f64", "#8c959f"), strict=True):
        rate.plot(run.index, run["acceptance_rate"], color=color, linewidth=2, label=f"MTP layer {name}")
    rate.set(xlabel="rollout", title="share of drafts accepted")
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    rate.legend(frameon=False, fontsize=8.5)
    trained = runs["trained"]
    loss.plot(trained.index, trained["mtp_loss"], color="#1a7f64", linewidth=2)
    loss.set(xlabel="rollout", title="loss of the MTP layer, nats")
    loss.set_ylim(bottom=0)
    for axes in (rate, loss):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.title.set_fontsize(9.5)
        axes.grid(color="#d8dee4", linewidth=0.6)
    return figure


if __name__ == "__main__":
    main()
