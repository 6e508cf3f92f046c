"""Run the whole DAG of a tiny model in a separate folder, and record its time and what the model learns.

    PYTHONPATH=workflow_scripts python benchmarks/demo.py tiny
    PYTHONPATH=workflow_scripts python benchmarks/demo.py tiny_moe
    PYTHONPATH=workflow_scripts python benchmarks/demo.py tiny_gpu --gpus 1 --kill-after 33

Compiled kernels are cached between runs (`results/caches`); ``--cold`` starts without them.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from record import record

ROOT = Path(__file__).resolve().parents[1]
CACHES = (
    "TRITON_CACHE_DIR",
    "TILELANG_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
    "TVM_FFI_CACHE_DIR",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model that the pipeline generates, such as tiny")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to train on")
    parser.add_argument("--configfile", type=Path, help="settings on top of the model's own")
    parser.add_argument("--kill-after", type=int, metavar="N", help="kill everything after N rollouts, then resume")
    parser.add_argument("--cold", action="store_true", help="start without compiled kernels")
    parser.add_argument("--folder", type=Path, help="keep the results here")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shutil.rmtree(folder / "results", ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        caches = folder / "caches" if arguments.cold else (ROOT / "results" / "caches")
        arguments.kernels = "none" if not arguments.gpus else "kept" if caches.exists() else "cold"
        seconds = run(arguments, folder, caches)
        record_run(arguments, folder / "results", seconds)


def run(arguments: argparse.Namespace, folder: Path, caches: Path) -> float:
    """Run Snakemake to the end, and return the seconds that it took. Compiled kernels are kept in ``caches``."""
    given = ["--configfile", arguments.configfile.resolve()] if arguments.configfile else []
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "all"),
        *("--directory", folder, *given),
        *("--config", f"models=[{arguments.model}]", "results=results", "preflight=warn", "--", "all"),
    ]
    environment = {name: str(caches / name.split("_")[0].lower()) for name in CACHES} | os.environ
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    while arguments.kill_after and process.poll() is None:
        if len(steps(folder / "results", arguments.model)) >= arguments.kill_after:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process = subprocess.Popen([*command[:-2], "--rerun-incomplete", *command[-2:]], env=environment)
            break
        time.sleep(0.5)
    if process.wait():
        sys.exit(f"error: Snakemake ended with status {process.returncode}; see {folder}")
    return time.perf_counter() - began


def steps(results: Path, model: str) -> list[dict[str, float]]:
    """The metrics of the finished rollouts."""
    files = (results / model / "grpo").glob("*/*/metrics.jsonl")
    lines = [line for file in files for line in file.read_text().splitlines() if line.endswith("}")]
    return [row for row in map(json.loads, lines) if "seconds_step" in row]


def record_run(arguments: argparse.Namespace, results: Path, seconds: float) -> None:
    """Record the time, the scores with their intervals, and figures from the training's metrics."""
    rows = pd.DataFrame(steps(results, arguments.model))
    note: dict[str, Any] = {"rollouts": len(rows)}
    if arguments.configfile:
        note["configfile"] = arguments.configfile.name
    if arguments.kill_after:
        note["killed_after"] = arguments.kill_after

    def figure(name: str, value: float, unit: str, **more: Any) -> None:
        record(name, arguments.model, value, unit, gpus=arguments.gpus, file="demo", **more, **note)

    figure("demo_seconds", seconds, "s", kernels=arguments.kernels)
    scores = pd.read_csv(results / "tables" / "scores.csv").set_index("weights")
    for name, row in scores.iterrows():
        weights = "base" if name == "base" else "trained"
        shares = row.filter(regex="@").astype(float).mul(100).round(1).to_dict()
        shape = {"problems": int(row["problems"]), "samples": int(row["samples"])}
        figure(f"tiny_accuracy_{weights}", 100 * row["avg@n"], "%", **shape, percent=shares)
    (difference,) = pd.read_csv(results / "tables" / "differences.csv").to_dict("records")
    points = {name: round(100 * value, 1) for name, value in difference.items() if name.endswith((" low", " high"))}
    figure("tiny_accuracy_gain", 100 * difference["difference"], "points", points=points)
    figure("step_seconds", rows["seconds_step"].median(), "s", first=round(float(rows["seconds_step"].iloc[0]), 1))
    figure(
        "logprob_mean_abs_diff", rows["log_prob_diff"].median(), "nats", largest=round(rows["log_prob_diff"].max(), 5)
    )
    for name, unit in (("mtp_loss", "nats"), ("acceptance_rate", "share"), ("acceptance_length", "tokens")):
        if name in rows:
            figure(name, rows[name].iloc[-1], unit, of="the last rollout", first=round(rows[name].iloc[0], 4))
    if "expert_load_max" in rows:
        figure("expert_load_max", rows["expert_load_max"].iloc[-1], "x an even share", of="the last rollout")


if __name__ == "__main__":
    main()
