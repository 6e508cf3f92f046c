"""Time training steps of a full-size model with random weights, and compare its memory with preflight's estimate.

A step is everything from a rollout's sequences to new weights: forward and backward passes over packs with GRPO's loss,
and the optimizer. Model FLOPs utilisation is 6 N D / (time x 989 TFLOP/s), without recomputation.

    PYTHONPATH=workflow_scripts python benchmarks/gpu_training.py --model 4B --budgets 8192 16384 32768
    PYTHONPATH=workflow_scripts python -P -m milepost.launch.torchrun --standalone --nproc-per-node 4 \\
        benchmarks/gpu_training.py --model 27B --tensor 4
"""

import argparse
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import record

from milepost.configuration.loading import load
from milepost.configuration.memory import GIB, estimate
from milepost.configuration.schema import Model, Optimizer, Parallel
from milepost.configuration.shape import architecture_of
from milepost.grpo import gpu_optimizer
from milepost.grpo.learner import Learner
from milepost.grpo.optimizer import build_optimizer
from milepost.grpo.policy import Policy
from milepost.grpo.run_state import Progress
from milepost.grpo.samples import TrainingSequence
from milepost.qwen3_5.build import build_model, finalize, initialize

ROOT = Path(__file__).resolve().parents[1]
PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200
PROMPT = 200  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="4B")
    parser.add_argument("--layers", type=int, help="use fewer layers")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--recompute", nargs="+", default=["full", "selective", "none"])
    parser.add_argument("--response", type=int, default=1024, help=f"tokens of a response; its prompt has {PROMPT}")
    parser.add_argument("--packs", type=int, default=4, help="packs per step and data-parallel rank")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after two warm-up steps")
    parser.add_argument("--cpu-offload", action="store_true")
    parser.add_argument(
        "--no-adam", action="store_true", help="skip the optimizer's step, if the host can't hold Adam's states"
    )
    parser.add_argument("--tensor", type=int, default=1, help="GPUs that share every matrix")
    parser.add_argument("--expert", type=int, default=1, help="GPUs that share the experts")
    parser.add_argument("--profile", type=Path, help="write a step's trace to this file, and print its kernels' times")
    arguments = parser.parse_args()
    if arguments.no_adam:
        gpu_optimizer.OffloadedAdam = NoAdam
    initialize(Parallel(tensor=arguments.tensor, expert=arguments.expert, sequence=arguments.tensor > 1))
    for recompute in arguments.recompute:
        for budget in arguments.budgets:
            try:
                measure(arguments, settings(arguments, recompute, budget))
            except torch.OutOfMemoryError as error:
                print(f"{arguments.model} recompute {recompute}, {budget} tokens: {error}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    finalize()


class NoAdam:
    """Replaces `OffloadedAdam` but takes no step: gradients are reduced and their norm is computed as usual."""

    def __init__(self, param_groups: list[dict[str, Any]], _: Optimizer) -> None:
        self.param_groups = param_groups

    def step(self) -> None:
        pass


def settings(arguments: argparse.Namespace, recompute: str, budget: int) -> Model:
    """The model's recipe on these GPUs, with this token budget."""
    changes = {
        "hardware": {"gpus": int(os.environ.get("WORLD_SIZE", 1))},
        "parallel": {"tensor": arguments.tensor, "expert": arguments.expert, "sequence": arguments.tensor > 1},
        "engine": {"gpus_per_engine": 1, "expert_parallel": 1},
        "conversion": {"processes": 1},
        "optimizer": {"cpu_offload": arguments.cpu_offload or arguments.no_adam},
        "training": {"max_tokens_per_gpu": budget, "recompute": recompute},
        "mtp": {"train": False},
        "sampling": {"max_prompt_tokens": PROMPT, "max_response_tokens": arguments.response},
    }
    if arguments.layers:
        changes["architecture"] = {"layers": arguments.layers}
    overrides = {"models": [arguments.model], "per_model": {arguments.model: changes}}
    return load(ROOT / "config" / "config.yaml", ROOT / "config" / "models", overrides).models[arguments.model]


def measure(arguments: argparse.Namespace, model: Model) -> None:
    architecture, training = architecture_of(model), model.training
    expected = estimate(architecture, model, torch.cuda.get_device_properties(0).total_memory / GIB)
    network = build_model(architecture, model.parallel, recompute=expected.recompute, experts=model.experts)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.zero_() if parameter.dim() == 1 else parameter.normal_(std=0.02)
            if name.endswith("out_norm.weight"):
                parameter.fill_(1)
    policy = Policy(network, model)
    learner = Learner(policy, build_optimizer(network, model.optimizer), model)
    gpus = dist.get_world_size()
    budget = arguments.packs * training.max_tokens_per_gpu * gpus
    sequences = made_up(architecture.vocab_size, arguments.response, budget)
    tokens = sum(len(sequence.ids) for sequence in sequences)
    torch.cuda.reset_peak_memory_stats()  # the optimizer briefly held the weights twice, to move them into one buffer
    progress, seconds = Progress(), []
    for _ in range(2 + arguments.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        metrics = learner.learn(sequences, progress)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert progress.bad_steps == 0, metrics
    if arguments.profile:
        profile(lambda: learner.learn(sequences, progress), arguments.profile)
    rate = tokens / min(seconds[2:]) / gpus
    free, total = torch.cuda.mem_get_info()
    used = (total - free) / GIB - (torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()) / GIB
    note = {
        "recompute": expected.recompute,
        "tokens_a_pack": training.max_tokens_per_gpu * arguments.tensor,
        "parallel": model.parallel.model_dump(),
        "response_tokens": arguments.response,
        "layers": architecture.num_layers,
        "cpu_offload": model.optimizer.cpu_offload,
        "adam": not arguments.no_adam,
    }
    if dist.get_rank():
        return
    note |= {"step_seconds": round(min(seconds[2:]), 3), "optimizer_seconds": round(metrics["seconds_optimizer"], 3)}
    share = 6 * architecture.active_parameters() * rate / PEAK_FLOPS
    record("train_mfu", arguments.model, share, "share", gpus=gpus, file="gpu_training", **note)
    record("train_tokens_per_second_per_gpu", arguments.model, rate, "tokens/s", gpus=gpus, file="gpu_training", **note)
    record(
        "memory_estimate_error",
        arguments.model,
        (expected.training - used) / used,
        "share",
        gpus=gpus,
        file="gpu_training",
        peak_gib=round(used, 2),
        estimated_gib=round(expected.training, 2),
        **note,
    )


def profile(step: Callable[[], Any], trace: Path) -> None:
    """Print the time of a step by kernel and how much of it kernels fill; write rank 0's trace."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    if dist.get_rank() == 0:
        events = profiler.key_averages()
        busy = sum(event.self_device_time_total for event in events if event.device_type.name == "CUDA") / 1e6
        print(f"profiled step: {seconds:.3f} s, kernels {busy:.3f} s", flush=True)
        print(events.table(sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=80), flush=True)
        profiler.export_chrome_trace(str(trace))
        print(events.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=80), flush=True)


def made_up(vocabulary: int, response: int, tokens: int) -> list[TrainingSequence]:
    """Random responses to random prompts, ``tokens`` in total, in the form that an engine returns."""
    generator = torch.Generator().manual_seed(0)
    return [
        TrainingSequence(
            ids=torch.randint(vocabulary, (PROMPT + response,), generator=generator),
            log_probs=torch.full((response,), -12.0),
            advantage=1.0 if number % 2 else -1.0,
        )
        for number in range(max(tokens // (PROMPT + response), 1))
    ]


if __name__ == "__main__":
    main()
