"""Train a model with GRPO: alone, or as one of several processes under torchrun. A stopped run is resumed.

This script prepares a run: its weights, its last checkpoint and its engine. `grpo.loop` trains; its docstring shows the
path of a rollout.
"""

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from milepost.checkpoints import torch_dist
from milepost.checkpoints.manifest import Manifest, describe, keep_manifest, read_manifest, write_manifest
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError, run
from milepost.common.files import hold, sha256_of_all
from milepost.common.interrupts import Interrupts
from milepost.common.jobs import job_parser
from milepost.common.machine import machine
from milepost.configuration import runs, schema
from milepost.configuration.layout import processes, shape_fault
from milepost.configuration.memory import GIB, estimate, rescaled_engine
from milepost.evaluation.overlap import overlap
from milepost.evaluation.problems import load_problems
from milepost.evaluation.scores import evaluate
from milepost.grpo import metrics, run_state
from milepost.grpo.callbacks import Checkpoints, Logs, Validation
from milepost.grpo.data import Prompt, PromptCursor, load_prompts
from milepost.grpo.groups import read_groups
from milepost.grpo.learner import Learner
from milepost.grpo.loop import Lead, Loop, control_group, from_rank_0
from milepost.grpo.optimizer import Optimizer, build_optimizer
from milepost.grpo.policy import Policy
from milepost.grpo.replay import NoEngine, Replay
from milepost.grpo.run_state import Progress
from milepost.grpo.sampler import Sampler
from milepost.grpo.settings import Settings
from milepost.grpo.validation import validation_protocol, validation_settings
from milepost.grpo.weight_sync import push_weights
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, finalize, initialize
from milepost.rewards.grader import Grader
from milepost.rollout.engine import start_engine
from milepost.rollout.prompts import load_tokenizer, stop_token_ids


@dataclass(frozen=True)
class Source:
    """What a run starts from.

    Attributes:
        hub: the model in the Hub's format: its tokenizer, and everything that training does not change.
        weights: the starting weights in torch_dist.
        inputs: digests of the starting weights and of the prompts.
    """

    hub: Manifest
    weights: Manifest
    architecture: Architecture
    inputs: dict[str, str]


@dataclass(frozen=True)
class MemoryPlan:
    """How a GPU's memory is used.

    Attributes:
        gpu_gib: memory of one GPU; infinite without one.
        recompute: which activations the backward pass recomputes.
        stay: whether weights and Adam's states stay on the GPU while the engine generates.
    """

    gpu_gib: float
    recompute: str
    stay: bool


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--hub", type=Path, required=True, help="the download's manifest")
    parser.add_argument("--weights", type=Path, required=True, help="the conversion's manifest")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="the training sets' manifests")
    parser.add_argument("--validation", type=Path, help="the validation set's manifest")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run: checkpoints, metrics, samples")
    parser.add_argument("--manifest", type=Path, required=True, help="the trained weights' manifest, written last")
    arguments = parser.parse_args()
    settings = Settings.model_validate(arguments.job["config"])
    if settings.validation.interval and arguments.validation is None:
        parser.error("validation.interval is set, but no --validation set is given: give one, or set interval: 0")

    initialize(settings.parallel, settings.training.seed)
    check_processes(settings)
    try:
        with ExitStack() as stack:
            checkpoint = train(arguments, settings, stack)
    except MemoryError as error:  # host memory, perhaps on this rank alone
        raise UserError(f"rank {dist.get_rank()}: {error or 'out of host memory: free some, and run again'}") from error
    except RuntimeError as error:  # the allocator's, NCCL's or the driver's
        if "out of memory" not in str(error).lower():
            raise
        raise UserError(f"rank {dist.get_rank()}: {out_of_memory(error)}") from error
    if dist.get_rank() == 0:
        write_result(arguments, checkpoint)
    finalize()


def check_processes(settings: Settings) -> None:
    """Refuse (`UserError`) another number of processes than configured, for which memory is estimated."""
    started, configured = dist.get_world_size(), processes(settings.hardware)
    if started != configured:
        raise UserError(
            f"hardware.processes: {started} training processes were started, but {configured} are configured (without"
            f" this key one per GPU, or one on the CPU): start {configured} (`python -m milepost.launch.torchrun"
            f" --standalone --nproc-per-node={configured}`), or set hardware.processes: {started}"
        )


def train(arguments: argparse.Namespace, settings: Settings, stack: ExitStack) -> Path:
    """Train, or resume training, and return the folder of the final checkpoint. Every rank calls this."""
    first, control = dist.get_rank() == 0, control_group()
    if first:
        stack.enter_context(hold(arguments.work))
        arguments.work.mkdir(exist_ok=True)
    from_rank_0(None, control)  # rank 0 may wait for days for another training in this folder
    interrupts = stack.enter_context(Interrupts())  # only now: until here a signal ends the process as usual
    say = narrator(settings)

    say("checking the weights")
    source = check_source(arguments, settings)
    plan = plan_memory(source.architecture, settings, say)
    say("loading the weights")
    model = load_model(source, settings, plan)
    policy = Policy(model, settings)
    say("preparing Adam's states")
    optimizer = build_optimizer(model, settings.optimizer, stay=plan.stay)

    saved = from_rank_0(find_checkpoint(arguments.work, source.inputs) if first else None, control)  # reads all bytes
    if saved:
        say(f"loading {saved.name}")
    progress = resume(saved, source, model, optimizer, arguments, settings)
    if (
        saved
        and progress.rollout == settings.training.rollouts
        and not progress.validation_due(settings.validation.interval)
    ):
        return saved

    optimizer.sleep()  # a starting engine takes its share of the memory that is free
    say("starting the engine")
    if plan.stay:
        engine = rescaled_engine(settings.engine, taken_gib(), plan.gpu_gib)
        settings = settings.model_copy(update={"engine": engine})
    lead = start_lead(arguments, settings, source, progress, saved, interrupts, stack) if first else None
    from_rank_0(None, control)  # no rank wakes before the engine has measured the free memory
    engine, hub = lead.sampler.engine if lead else None, HubCheckpoint(source.hub.root)

    def push() -> None:
        if settings.training.mode != "train_only":
            push_weights(model, source.architecture, hub, engine, settings.engine)

    return Loop(
        settings=settings,
        progress=progress,
        learner=Learner(policy, optimizer, settings),
        push_weights=push,
        checkpoints=Checkpoints(arguments.work, settings, progress, arguments.job, saved),
        interrupts=interrupts,
        lead=lead,
        control=control,
    ).run()


def check_source(arguments: argparse.Namespace, settings: Settings) -> Source:
    """Compare the starting weights with their manifests, and their shape with the settings."""
    hub = read_manifest(arguments.hub).require()
    weights = read_manifest(arguments.weights).require(digests=dist.get_rank() == 0)
    architecture = Architecture.from_folder(hub.root)
    if fault := shape_fault(architecture, settings.parallel, settings.experts, on_gpu=settings.hardware.gpus > 0):
        raise UserError(str(fault))
    prompts = {
        f"{path.stem}/{name}" if len(arguments.data) > 1 else name: entry
        for path in arguments.data
        for name, entry in read_manifest(path).files.items()
    }
    inputs = {"weights": sha256_of_all(hub.files), "prompts": sha256_of_all(prompts)}
    return Source(hub, weights, architecture, inputs)


def plan_memory(architecture: Architecture, settings: Settings, say: Callable[[str], None]) -> MemoryPlan:
    """Decide what to recompute and what stays on the GPU, for all ranks by rank 0's GPU."""
    gpu_gib = from_rank_0(gpu_memory_gib())
    memory = estimate(architecture, settings, gpu_gib)
    stay = memory.fits_beside_engine(gpu_gib)
    if settings.training.recompute == "auto":
        say(f"recompute: {memory.recompute}, the least that fits {gpu_gib:.0f} GiB a GPU")
    say(f"while the engine generates weights and Adam's states {'stay on the GPU' if stay else 'wait on the host'}")
    return MemoryPlan(gpu_gib, memory.recompute, stay)


def load_model(source: Source, settings: Settings, plan: MemoryPlan) -> nn.Module:
    """The model in its parallel layout, with the starting weights."""
    model = build_model(
        source.architecture,
        settings.parallel,
        dtype=getattr(torch, settings.training.dtype),
        recompute=plan.recompute,
        mtp_num_layers=int(settings.mtp.train),
        experts=settings.experts,
    )
    torch_dist.load(model, source.weights.root)
    return model


def find_checkpoint(work: Path, inputs: dict[str, str]) -> Path | None:
    """The checkpoint to resume from; `UserError` if it was made from other weights or prompts than ``inputs``."""
    saved = run_state.newest(work)
    run_state.clear(work)
    if saved and (then := run_state.read_progress(saved).inputs) != inputs:
        changed = " and ".join(name for name in inputs if then.get(name) != inputs[name])
        raise UserError(f"{work}: begun with {changed} that have changed since: move that folder away to start again")
    return saved


def resume(
    saved: Path | None,
    source: Source,
    model: nn.Module,
    optimizer: Optimizer,
    arguments: argparse.Namespace,
    settings: Settings,
) -> Progress:
    """Load the checkpoint ``saved``, if there is one, and truncate the logs to their lengths at that time."""
    progress = run_state.load(saved, model, optimizer) if saved else Progress(inputs=source.inputs)
    if settings.validation.interval:
        protocol = validation_protocol(read_manifest(arguments.validation), settings)
        if progress.protocol != protocol:
            progress.score, progress.protocol = None, protocol
    if progress.rollout > settings.training.rollouts:
        raise UserError(
            f"{arguments.work}: holds {progress.rollout} rollouts, training.rollouts is {settings.training.rollouts}:"
            " raise it, or move that folder away"
        )
    if dist.get_rank() == 0:
        metrics.truncate_logs(arguments.work, progress.log_bytes)
    return progress


def start_lead(
    arguments: argparse.Namespace,
    settings: Settings,
    source: Source,
    progress: Progress,
    saved: Path | None,
    interrupts: Interrupts,
    stack: ExitStack,
) -> Lead:
    """Start what only rank 0 has: prompts, engine, graders, validation, logs."""
    training, validation = settings.training, settings.validation
    tokenizer = load_tokenizer(source.hub.root)
    prompts = read_prompts(arguments, settings, tokenizer)
    cursor = PromptCursor(prompts, training.seed, training.weights)
    if progress.cursor:
        cursor.restore(progress.cursor)
    log = metrics.RunLog(arguments.work, progress.rollout + 1, settings)
    stack.callback(log.close)
    shown = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # what is left follows from the run's own steps
    bar = tqdm(total=training.rollouts, initial=progress.rollout, desc="train", bar_format=shown, mininterval=1)
    stack.callback(bar.close)
    logs = Logs(settings, log, bar, tokenizer)
    if training.mode == "train_only":
        replay = Replay(settings, Path(training.replay).expanduser(), prompts, cursor, NoEngine())
        return Lead(replay, Validation(0, lambda rollout: {}, logs, interrupts), logs)

    stops = stop_token_ids(source.hub.root, tokenizer)
    carried = saved / run_state.GROUPS if saved else None
    waiting = read_groups(carried, prompts) if carried and carried.exists() else ()
    validation_set = read_manifest(arguments.validation) if validation.interval else None
    problems = load_problems(validation_set, settings.validated_by.labels) if validation_set else []
    for path in arguments.data if validation_set else ():
        if shared := overlap(read_manifest(path), validation_set):
            metrics.warn(shared)

    max_requests = max(
        training.prompts_per_rollout * training.samples_per_prompt, len(problems) * validation.samples_per_problem
    )
    engine = start_engine(source.hub.root, settings.engine, arguments.work / "engine", max_requests)
    stack.callback(engine.close)
    engine.sleep()
    engine.wake()  # as in every step: now it holds no caches, which leaves room for sending the weights
    started: list[Grader] = []

    def grader(reward: schema.Reward) -> Grader:
        """The grader of a reward, shared by all sets that have this reward."""
        if not (same := [one for one in started if one.settings == reward]):
            started.append(stack.enter_context(Grader(reward)))
        return same[0] if same else started[-1]

    graders = {name: grader(settings.graded_by(name)) for name in training.datasets}
    validation_grader = grader(settings.validated_by)

    def validate(rollout: int) -> dict[str, float]:
        samples = arguments.work / "validation" / f"{rollout:06d}.jsonl"
        samples.parent.mkdir(exist_ok=True)
        # What is there was sampled by weights that were lost before they were saved, perhaps slightly different ones.
        samples.unlink(missing_ok=True)
        wanted, sampler = validation_settings(settings), {"rollout": rollout}
        scores = evaluate(engine, tokenizer, stops, problems, wanted, validation_grader, samples, sampler)
        names = ("average", "standard_error", "truncated_share", "mean_tokens")
        return {f"validation_{name}": scores[name] for name in names if scores[name] is not None}

    keep_in = arguments.work if training.save_rollouts or training.mode == "rollout_only" else None
    if keep_in:
        (keep_in / runs.ROLLOUTS).mkdir(exist_ok=True)
    return Lead(
        sampler=Sampler(settings, engine, tokenizer, stops, graders, cursor, interrupts, waiting, keep_in),
        validation=Validation(validation.interval, validate, logs, interrupts),
        logs=logs,
    )


def read_prompts(
    arguments: argparse.Namespace, settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Prompt]]:
    """The prompts of each training set, by its name."""
    prompts = {}
    for name, path in zip(settings.training.datasets, arguments.data, strict=True):
        data, labels = read_manifest(path).require(digests=True), settings.graded_by(name).labels
        prompts[name], intake = load_prompts(name, data, tokenizer, settings.sampling, labels)
        print(f"{name}: {intake}", file=sys.stderr)
    return prompts


def narrator(settings: Settings) -> Callable[[str], None]:
    """Return a function that prints start-up progress: on GPUs, where a start takes minutes, and on rank 0 alone."""
    if dist.get_rank() or not settings.hardware.gpus:
        return lambda phase: None
    began = time.monotonic()
    return lambda phase: print(f"[{time.monotonic() - began:4.0f} s] {phase}", file=sys.stderr)


def gpu_memory_gib() -> float:
    """The memory of this process's GPU; infinite without one."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else math.inf


def taken_gib() -> float:
    """How much of this process's GPU is in use."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def out_of_memory(error: RuntimeError) -> str:
    """The error line for a GPU out of memory: where, and what to do."""
    here = Path(__file__).parent
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(here)]
    place = f"{Path(ours[-1].filename).relative_to(here)}, line {ours[-1].lineno}"
    return (
        f"{str(error).partition(' Of the allocated memory')[0]} ({place}): lower training.max_tokens_per_gpu or"
        " engine.mem_fraction_static and run again; it goes on from the last checkpoint"
    )


def write_result(arguments: argparse.Namespace, checkpoint: Path) -> None:
    """Write the manifest of the trained weights: the final checkpoint's files, and the logs."""
    whole = read_manifest(checkpoint / "manifest.json")
    weights = {f"{checkpoint.name}/{name}": entry for name, entry in whole.files.items() if name.startswith("weights/")}
    logs = {name: describe(arguments.work / name) for name in (metrics.METRICS, metrics.SAMPLES)}
    best = run_state.best(arguments.work)
    facts: dict[str, Any] = {
        "weights": f"{checkpoint.name}/weights",
        "metrics": metrics.METRICS,
        "samples": metrics.SAMPLES,
        "rollouts": run_state.read_progress(checkpoint).rollout,
        "checkpoint": checkpoint.name,
        "best": {"checkpoint": best.name, "score": run_state.read_progress(best).score} if best else None,
        "made_by": runs.made_by(arguments.work),
        "machine": machine(),
    }
    files = weights | logs
    keep_manifest(write_manifest(arguments.manifest, "train", arguments.work, files, arguments.job, facts))


if __name__ == "__main__":
    run(main)
