"""Run GRPO steps of a recipe at full size with random weights, through the pipeline's rules, and time every phase.

For each model: make a checkpoint of its shape, run `snakemake train_X` for the given number of rollouts, and with
``--evaluate`` score the base model. A random model earns no reward, so a small entropy bonus provides the gradient; its
responses hardly ever stop, so all have the given length. The run is killed after its last rollout instead of saving,
which would take 14 bytes of disk per parameter. Finished parts are not repeated: rerun the command if it was cut off.

    PYTHONPATH=workflow_scripts python benchmarks/gpu_recipes.py --models 4B 9B 27B 35B_A3B --response 2048

On fewer GPUs than the recipe's, change its layout: ``--gpus 1 --change '{"parallel": {"tensor": 1}}'``.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from gpu_training import PEAK_FLOPS
from record import record

from milepost.configuration.layers import merge
from milepost.configuration.loading import load
from milepost.configuration.memory import CONTEXT_GIB, GIB, estimate
from milepost.configuration.schema import Model
from milepost.configuration.shape import architecture_of

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "train", "optimizer", "sync", "sleep_wake")  # "optimizer" is part of "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["4B", "9B", "27B", "35B_A3B"])
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--response", type=int, default=2048, help="tokens of every response")
    parser.add_argument("--rollouts", type=int, default=4, help="the first is a warm-up and not counted")
    parser.add_argument("--evaluate", action="store_true", help="score the base weights: 30 problems x 16 samples")
    parser.add_argument("--change", type=json.loads, default={}, help="JSON: settings for every model")
    parser.add_argument(
        "--prepare", action="store_true", help="only make checkpoints and conversions, which need no GPU"
    )
    parser.add_argument("--folder", type=Path, default=Path("results/random"), help="folder of checkpoints and results")
    parser.add_argument("--keep-weights", action="store_true", help="don't remove each model's weights after its run")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: asked to end"))  # exit through the cleanup
    for name in arguments.models:
        overrides = settings(name, arguments)
        model = load(ROOT / "config" / "config.yaml", ROOT / "config" / "models", overrides).models[name]
        run = Run(name, arguments, overrides)
        if arguments.prepare:
            make_checkpoint(name, arguments.folder)
            run.convert()
            continue
        if not run.recorded("step_seconds"):
            if len(run.steps()) < arguments.rollouts:  # else only the recording is missing
                make_checkpoint(name, arguments.folder)
                run.train()
            run.record_steps(model)
        if arguments.evaluate and not run.recorded("evaluation_seconds"):
            make_checkpoint(name, arguments.folder)
            run.evaluate()
        if not arguments.keep_weights:
            run.remove_weights()


def settings(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings on top of the recipe's."""
    changes = {
        "source": {"folder": str((arguments.folder / name).absolute())},
        "hardware": {"gpus": arguments.gpus, "cores": len(os.sched_getaffinity(0))},
        "algorithm": {"entropy_coefficient": 1e-4},
        "training": {"dataset": "sums-train", "rollouts": 1000, "save_interval": 1000},
        "validation": {"interval": 0},
        "sampling": {"max_response_tokens": arguments.response},
        "evaluation": {"datasets": ["thirty-sums"], "max_response_tokens": arguments.response},
    }
    return {
        "models": [name],
        "run": f"responses-of-{arguments.response}",
        "results": str(arguments.folder / "results"),
        "preflight": "warn",
        "datasets": {
            "thirty-sums": {
                "problems": {"split": "evaluation", "seed": 0, "rows": 30},
                "file": "thirty-sums.jsonl",
            }
        },
        "per_model": {name: merge(changes, arguments.change)},
    }


def make_checkpoint(name: str, folder: Path) -> None:
    """Make a checkpoint of the model's shape, unless it exists."""
    if not (folder / name / "model.safetensors.index.json").exists():
        subprocess.run(
            [sys.executable, Path(__file__).with_name("random_checkpoint.py"), name, folder / name], check=True
        )


class Run:
    """One model's run and its measurements."""

    def __init__(self, name: str, arguments: argparse.Namespace, overrides: dict[str, Any]) -> None:
        self.name, self.arguments = name, arguments
        self.results = arguments.folder / "results"
        self.results.mkdir(parents=True, exist_ok=True)
        self.configuration = self.results / f"{name}-{overrides['run']}.yaml"
        self.configuration.write_text(yaml.safe_dump(overrides))
        self.grpo = self.results / name / "grpo" / overrides["run"]
        self.figures = self.results / f"{name}-{overrides['run']}.json"  # the recorded figures

    def recorded(self, figure: str) -> bool:
        return self.figures.exists() and figure in json.loads(self.figures.read_text())

    def note_recorded(self, figure: str) -> None:
        done = json.loads(self.figures.read_text()) if self.figures.exists() else []
        self.figures.write_text(json.dumps([*done, figure]))

    @contextlib.contextmanager
    def snakemake(self, target: str | Path) -> Iterator[subprocess.Popen]:
        """Run Snakemake in the background; at the end, kill it and all its children."""
        options = ["--cores", "all", "--configfile", self.configuration]
        command = [sys.executable, "-m", "snakemake", *options, "--", target]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def convert(self) -> None:
        """Convert the checkpoint to torch_dist."""
        with self.snakemake(self.results / self.name / "convert.json") as process:
            if status := process.wait():
                sys.exit(f"error: {self.name}: the conversion failed, status {status}")

    def train(self) -> None:
        """Train until enough rollouts are done, then kill everything."""
        shutil.rmtree(self.grpo, ignore_errors=True)
        with self.snakemake(f"train_{self.name}") as process:
            while len(self.steps()) < self.arguments.rollouts:
                if process.poll() is not None:
                    sys.exit(f"error: {self.name}: training ended by itself, status {process.returncode}")
                time.sleep(1)

    def steps(self) -> list[dict[str, float]]:
        """The metrics of the finished rollouts."""
        return [
            row
            for file in self.grpo.glob("*/metrics.jsonl")
            for row in map(json.loads, file.read_text().splitlines())
            if "seconds_step" in row
        ]

    def record_steps(self, model: Model) -> None:
        """Record figures of the median step, without the first one."""
        steps, gpus = self.steps()[1:], self.arguments.gpus
        shape = architecture_of(model)
        needed = estimate(shape, model, torch.cuda.get_device_properties(0).total_memory / GIB)
        median = {name: statistics.median(row[name] for row in steps) for name in steps[0]}
        tokens = median["tokens_per_second"] * median["seconds_step"]
        rollout = model.training.prompts_per_rollout * model.training.samples_per_prompt
        note = {
            "steps": len(steps),
            "responses": rollout,
            "response_tokens": self.arguments.response,
            "parallel": model.parallel.model_dump(),
            "recompute": needed.recompute,
            "tokens_a_pack": model.training.max_tokens_per_gpu * model.parallel.tensor * model.parallel.context,
            "cpu_offload": model.optimizer.cpu_offload,
            "engines": gpus // model.engine.gpus_per_engine,
        }

        def figure(name: str, value: float, unit: str, **more: Any) -> None:
            record(name, self.name, value, unit, gpus=gpus, file="gpu_recipes", **more, **note)

        phases = {phase: round(median[f"seconds_{phase}"], 3) for phase in PHASES}
        rate = tokens / median["seconds_train"] / gpus
        figure("step_seconds", median["seconds_step"], "s", **phases)
        figure("train_mfu", 6 * shape.active_parameters() * rate / PEAK_FLOPS, "share")
        figure("train_tokens_per_second_per_gpu", rate, "tokens/s")
        figure("step_tokens_per_second_per_gpu", tokens / median["seconds_step"] / gpus, "tokens/s")
        figure(
            "rollout_tokens_per_second_per_gpu",
            rollout * median["response_length_mean"] / median["seconds_rollout"] / gpus,
            "tokens/s",
        )
        figure("weight_sync_seconds", median["seconds_sync"], "s")
        figure("logprob_mean_abs_diff", max(row["log_prob_diff"] for row in steps), "nats")
        peak = max(row["gpu_memory_gib"] for row in steps) + CONTEXT_GIB
        error = (needed.training - peak) / peak
        figure("memory_estimate_error", error, "share", peak_gib=peak, estimated_gib=needed.training)
        figure("host_memory_gib", max(row["host_memory_gib"] for row in steps), "GiB")
        converted = pd.read_csv(self.results / "benchmarks" / self.name / "convert.tsv", sep="\t")
        figure("convert_seconds", converted["s"].iloc[-1], "s")
        for name in ("idle_share", "acceptance_length", "expert_imbalance"):
            if name in median:
                figure(name, median[name], "tokens" if name == "acceptance_length" else "share")
        self.note_recorded("step_seconds")

    def remove_weights(self) -> None:
        """Remove the checkpoint, its links and its conversion: the disk may not hold two models."""
        for folder in (self.arguments.folder / self.name, *(self.results / "hub").glob(f"{self.name}@*")):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(self.results / self.name, ignore_errors=True)

    def evaluate(self) -> None:
        """Record the time of the base weights' evaluation, including the servers' start."""
        scores = self.results / self.name / "eval" / "thirty-sums" / "base.json"
        began = time.perf_counter()
        with self.snakemake(scores) as process:
            if status := process.wait():
                sys.exit(f"error: {self.name}: the evaluation failed, status {status}")
        record(
            "evaluation_seconds",
            self.name,
            time.perf_counter() - began,
            "s",
            gpus=self.arguments.gpus,
            file="gpu_recipes",
            answers=30 * 16,
            response_tokens=self.arguments.response,
        )
        self.note_recorded("evaluation_seconds")


if __name__ == "__main__":
    main()
