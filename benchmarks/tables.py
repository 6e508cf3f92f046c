"""Fill the tables of README.md, benchmarks/README.md and docs/algorithms.md from the recorded lines.

So no figure is copied by hand.

    python benchmarks/tables.py

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "algorithms.md")
TABLE = re.compile(r"(?<=<!-- table: )(\w+)( -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)

Line = dict[str, Any]


def lines(file: str) -> list[Line]:
    """The records of a file in benchmarks/results, in order of measurement."""
    text = (ROOT / "benchmarks" / "results" / f"{file}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def runs(file: str) -> Iterator[dict[str, Line]]:
    """The records of each command and model, by name; repeated runs of a command stay separate."""
    for _, group in groupby(lines(file), key=lambda line: (line["command"], line["model"], line["date"])):
        run: dict[str, Line] = {}
        for line in group:
            if line["name"] in run:
                yield run
                run = {}
            run[line["name"]] = line
        yield run


def demo_scores() -> list[Line]:
    """The demo's last run, for the README."""
    run = [run for run in runs("demo") if run["demo_seconds"]["model"] == "tiny"][-1]
    rows = []
    for weights in ("base", "trained"):
        share = run[f"tiny_accuracy_{weights}"]["note"]["percent"]
        rows.append(
            {
                "64 problems x 8 samples": weights,
                "avg@8": f"{share['avg@n']:.1f}",
                "95% interval": f"{share['avg@n low']:.1f} to {share['avg@n high']:.1f}",
                "pass@4": f"{share['pass@4']:.1f}",
                "maj@8": f"{share['maj@n']:.1f}",
            }
        )
    gain = run["tiny_accuracy_gain"]
    points = gain["note"]["points"]
    intervals = [f"{points[f'{kind} low']:+.1f} to {points[f'{kind} high']:+.1f}" for kind in ("t", "bootstrap")]
    difference = {
        "64 problems x 8 samples": "trained minus base",
        "avg@8": f"{gain['value']:+.1f}",
        "95% interval": "{} (t), {} (BCa bootstrap)".format(*intervals),
    }
    return [*rows, difference]


def demos() -> list[Line]:
    """All runs of a tiny model's whole DAG."""
    return [
        {
            "model": ", ".join(
                [run["demo_seconds"]["model"], *run["demo_seconds"]["note"].get("configfile", "").split()]
            ),
            "on": run["demo_seconds"]["hardware"],
            "whole DAG, s": f"{run['demo_seconds']['value']:.0f}",
            "a step, s": f"{run['step_seconds']['value']:.2f}",
            "right before, %": f"{run['tiny_accuracy_base']['value']:.1f}",
            "and after": f"{run['tiny_accuracy_trained']['value']:.1f}",
            "log-probs apart, nats": f"{run['logprob_mean_abs_diff']['value']:.5f}",
            "MTP loss, first and last": _first_and_last(run.get("mtp_loss")),
        }
        for run in runs("demo")
    ]


def _with_settings(line: Line) -> str:
    """The model, and the file of settings that were laid over its own."""
    file = line["note"].get("configfile")
    return f"{line['model']}, {file}" if file else line["model"]


def against_trl() -> list[Line]:
    """A GRPO step on a CPU, ours and TRL's."""
    recorded = lines("step_against_trl")
    return [
        {
            "on": ours["hardware"],
            "date": ours["date"],
            "Milepost, s": f"{ours['value']:.1f}",
            f"{trl['note']['engine'].replace('trl', 'TRL')}, s": f"{trl['value']:.1f}",
            "times as fast": f"{ratio['value']:.1f}",
        }
        for ours, trl, ratio in zip(recorded[::3], recorded[1::3], recorded[2::3], strict=True)
    ]


def algorithm_comparison() -> list[Line]:
    """What replaced and carried groups are worth on the tiny model: the last comparison."""
    recorded = lines("algorithms")
    last = [line for line in recorded if line["date"] == recorded[-1]["date"]]
    rows: dict[str, Line] = {}
    for line in last:
        note = line["note"]
        row = rows.setdefault(note["way"], {f"{len(note['runs'])} runs each": note["way"]})
        if note["rollout"] % 20 == 0:
            row[f"after {note['rollout']} rollouts, % right"] = f"{line['value']:.1f} ± {note['half_width']:.1f}"
        row["prompts"] = f"{note['prompts']:.0f}"
        row["age of tokens, rollouts"] = f"{note['token_age']:.2f}"
    return list(rows.values())


def training() -> list[Line]:
    """Training steps alone."""
    rows = []
    for run in runs("gpu_training"):
        line = run["train_mfu"]
        note = line["note"]
        memory = run.get("memory_estimate_error")
        rows.append(
            {
                "model": line["model"],
                "GPUs": _shared(line),
                "layers": note["layers"],
                "recomputed": note["recompute"],
                "tokens a pack": f"{note['tokens_a_pack']:,}",
                "tokens/s a GPU": f"{run['train_tokens_per_second_per_gpu']['value']:,.0f}",
                "share of 989 TFLOP/s": f"{100 * line['value']:.1f} %",
                "peak GiB": f"{memory['note']['peak_gib']:.1f}" if memory else "",
            }
        )
    return rows


def steps() -> list[Line]:
    """Whole GRPO steps at full size."""
    rows = []
    for run in (run for run in runs("gpu_recipes") if "step_seconds" in run):
        line = run["step_seconds"]
        note, memory = line["note"], run["memory_estimate_error"]["note"]
        adam = f", Adam {note['optimizer']:.1f}" if note.get("optimizer", 0) > 1 else ""
        rows.append(
            {
                "model": line["model"],
                "GPUs": _shared(line),
                "engines": note["engines"],
                "responses x tokens": f"{note['responses']} x {note['response_tokens']}",
                "recomputed": note["recompute"],
                "warm steps": note["steps"],
                "step, s": f"{line['value']:.1f}",
                "rollout": f"{note['rollout']:.1f}",
                "training": f"{note['train']:.1f}{adam}",
                "sync": f"{note['sync']:.2f}",
                "sleep, wake": f"{note['sleep_wake']:.1f}",
                "share of 989 TFLOP/s": f"{100 * run['train_mfu']['value']:.1f} %",
                "peak GiB, estimate": f"{memory['peak_gib']:.1f}, {memory['estimated_gib']:.1f}",
                "host GiB": f"{run['host_memory_gib']['value']:.0f}",
                "log-probs apart, nats": f"{run['logprob_mean_abs_diff']['value']:.3f}",
            }
        )
    return rows


def conversion() -> list[Line]:
    """Conversion to torch_dist and back, against a copy of the same files."""
    recorded = lines("conversion")
    return [
        {
            "model": share["model"],
            "from, to": "Hub, torch_dist" if share["name"].startswith("convert") else "torch_dist, Hub",
            "GiB": f"{share['note']['bytes'] / 2**30:.1f}",
            "cp, s": share["note"]["copy_seconds"],
            "s": share["note"][f"{share['name'].split('_')[0]}_seconds"],
            "share of cp's speed": f"{100 * share['value']:.0f} %",
            "host memory, GiB": f"{memory['value']:.1f}",
        }
        for share, memory in zip(recorded[::2], recorded[1::2], strict=True)
    ]


def rollouts() -> list[Line]:
    """Throughput of rollouts, as ratios of two measurements in one run."""
    rows = []
    for line in lines("gpu_rollout"):
        note = line["note"]
        other = next(name for name in note if name.startswith(("sglang_tokens", "tokens_per_second_")))
        rows.append(
            {
                "figure": line["name"],
                "model": line["model"],
                "on": f"{line['gpus']} x {line['hardware']}",
                "responses x tokens": f"{note['prompts']} x {note['response_tokens']}",
                "tokens/s": f"{note['tokens_per_second']:,}",
                "against": f"{note[other]:,}",
                "ratio": f"{line['value']:.3f}",
            }
        )
    return rows


def drafts() -> list[Line]:
    """How often drafts are accepted, with the MTP layer trained and frozen."""
    return [
        {
            "MTP layer": run["acceptance_rate"]["note"]["mtp"],
            "rollouts": run["acceptance_rate"]["note"]["rollouts"],
            "drafts accepted, first rollout": f"{100 * run['acceptance_rate']['note']['first']:.1f} %",
            "last five": f"{100 * run['acceptance_rate']['value']:.1f} %",
            "tokens a pass": f"{run['acceptance_length']['value']:.2f}",
            "reward": run["acceptance_rate"]["note"]["reward"],
        }
        for run in runs("drafting")
        if "acceptance_rate" in run
    ]


def rounding() -> list[Line]:
    """How far bf16 takes a random model from fp32."""
    return [
        {
            "model": line["model"],
            "layers": line["note"]["layers"],
            "width": line["note"]["width"],
            "size of embeddings": line["note"]["stream"],
            "log-probs apart, nats": f"{line['value']:.3f}",
        }
        for line in lines("rounding")
    ]


TABLES: dict[str, Callable[[], list[Line]]] = {
    function.__name__: function
    for function in (
        demo_scores,
        demos,
        against_trl,
        algorithm_comparison,
        training,
        steps,
        conversion,
        rollouts,
        drafts,
        rounding,
    )
}


def filled(text: str) -> str:
    """A page with each of its tables regenerated."""

    def table(found: re.Match) -> str:
        rows = pd.DataFrame(TABLES[found[1]]()).fillna("")
        return f"{found[1]}{found[2]}\n{rows.to_markdown(index=False, disable_numparse=True)}\n\n"

    return TABLE.sub(table, text)


def _shared(line: Line) -> str:
    """The number of GPUs and the parallel layout."""
    parallel = line["note"].get("parallel") or {}
    ways = [f"{way} {parallel[way]}" for way in ("tensor", "expert") if parallel.get(way, 1) > 1]
    return ", ".join([str(line["gpus"]), *ways])


def _first_and_last(line: Line | None) -> str:
    return f"{line['note']['first']:.2f}, {line['value']:.2f}" if line else ""


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
