"""Train a model with GRPO: alone, or as one of several processes under torchrun. A stopped run is continued."""

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from milepost.checkpoints import torch_dist
from milepost.checkpoints.manifest import Manifest, describe, keep_manifest, read_manifest, write_manifest
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError, run
from milepost.common.files import hold, sha256_of_all
from milepost.common.interrupts import Interrupts
from milepost.common.jobs import job_parser
from milepost.common.problems import Problem
from milepost.configuration import runs, schema
from milepost.configuration.layout import shape_fault
from milepost.configuration.memory import GIB, beside, estimate
from milepost.evaluation.overlap import overlap
from milepost.evaluation.problems import load_problems
from milepost.evaluation.scores import evaluate
from milepost.grpo import metrics, run_state
from milepost.grpo.data import PromptCursor, load_prompts
from milepost.grpo.learner import Learner
from milepost.grpo.loop import Driver, Loop, control_group, from_rank_0
from milepost.grpo.optimizer import build_optimizer
from milepost.grpo.policy import Policy
from milepost.grpo.run_state import Progress
from milepost.grpo.weight_sync import push_weights
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, finalize, initialize
from milepost.rewards.grader import Grader
from milepost.rollout.engine import RolloutEngine, start_engine
from milepost.rollout.prompts import load_tokenizer, stop_token_ids


class Settings(schema.Section):
    """The sections of the configuration that a training reads."""

    training: schema.Training
    validation: schema.Validation
    parallel: schema.Parallel
    algorithm: schema.Algorithm
    optimizer: schema.Optimizer
    mtp: schema.Mtp
    sampling: schema.Sampling
    engine: schema.Engine
    experts: schema.Experts
    reward: schema.Reward
    reward_code: dict[str, str] | None = None  # of a user's functions, by file: it decides which run goes on
    validation_reward: schema.Reward | None = None  # where it is another one
    validation_reward_code: dict[str, str] | None = None
    hardware: schema.Hardware


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--hub", type=Path, required=True, help="the download's manifest")
    parser.add_argument("--weights", type=Path, required=True, help="the conversion's manifest")
    parser.add_argument("--data", type=Path, required=True, help="the training set's manifest")
    parser.add_argument("--validation", type=Path, help="the validation set's manifest")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run: checkpoints, metrics, samples")
    parser.add_argument("--manifest", type=Path, required=True, help="the trained weights' manifest, written last")
    arguments = parser.parse_args()
    settings = Settings.model_validate(arguments.job["config"])
    if settings.validation.interval and arguments.validation is None:
        parser.error("validation.interval is set, but no --validation set is given: give one, or set interval: 0")

    initialize(settings.parallel, settings.training.seed)
    try:
        with ExitStack() as stack:
            checkpoint = train(arguments, settings, stack)
    except MemoryError as error:  # the host's, of this rank perhaps alone
        raise UserError(f"rank {dist.get_rank()}: {error}") from error
    except RuntimeError as error:  # the allocator's, NCCL's or the driver's
        if "out of memory" not in str(error).lower():
            raise
        raise UserError(f"rank {dist.get_rank()}: {out_of_memory(error)}") from error
    if dist.get_rank() == 0:
        write_result(arguments, checkpoint)
    finalize()


def train(arguments: argparse.Namespace, settings: Settings, stack: ExitStack) -> Path:
    """Train, or go on training, and return the final checkpoint's folder; every rank does."""
    first, control = dist.get_rank() == 0, control_group()
    if first:
        stack.enter_context(hold(arguments.work))
        arguments.work.mkdir(exist_ok=True)
    from_rank_0(None, control)  # another training may be at work there for days
    interrupts = stack.enter_context(Interrupts())  # not while it waits for another training's end
    say = narrator(settings)
    say("checking the weights")
    hub_manifest, weights = read_manifest(arguments.hub).require(), read_manifest(arguments.weights)
    weights.require(digests=first)
    inputs = {
        "weights": sha256_of_all(hub_manifest.files),
        "prompts": sha256_of_all(read_manifest(arguments.data).files),
    }
    architecture, hub = Architecture.from_folder(hub_manifest.root), HubCheckpoint(hub_manifest.root)
    if fault := shape_fault(architecture, settings.parallel, settings.experts, on_gpu=settings.hardware.gpus > 0):
        raise UserError(str(fault))
    training = settings.training
    gpu_gib = from_rank_0(gpu_memory_gib())
    memory = estimate(architecture, settings, gpu_gib)
    stay = memory.lasts_beside_engine(gpu_gib)
    if training.recompute == "auto":
        say(f"recompute: {memory.recompute}, the least that fits {gpu_gib:.0f} GiB a GPU")
    say(f"while the engine generates weights and Adam's states {'stay on the GPU' if stay else 'wait on the host'}")
    say("loading the weights")
    model = build_model(
        architecture,
        settings.parallel,
        dtype=getattr(torch, training.dtype),
        recompute=memory.recompute,
        mtp_num_layers=int(settings.mtp.train),
        experts=settings.experts,
    )
    torch_dist.load(model, weights.root)
    policy = Policy(
        model,
        training,
        settings.algorithm,
        settings.sampling,
        settings.mtp,
        replays_routing=settings.engine.replay_routing,
    )
    say("preparing Adam's states")
    optimizer = build_optimizer(model, settings.optimizer, stay=stay)

    saved = from_rank_0(find_checkpoint(arguments.work, inputs) if first else None, control)  # it reads all bytes
    if saved:
        say(f"loading {saved.name}")
    progress = run_state.load(saved, model, optimizer) if saved else Progress(inputs=inputs)
    if settings.validation.interval and progress.protocol != (protocol := validation_protocol(arguments, settings)):
        progress.score, progress.protocol = None, protocol
    if progress.rollout > training.rollouts:
        raise UserError(
            f"{arguments.work}: holds {progress.rollout} rollouts, training.rollouts is {training.rollouts}:"
            " raise it, or move that folder away"
        )
    if first:
        metrics.truncate_logs(arguments.work, progress.log_bytes)
    if saved and progress.rollout == training.rollouts and not progress.validation_due(settings.validation.interval):
        return saved

    optimizer.sleep()  # the engine takes its share of what is free when it starts
    say("starting the engine")
    if stay:
        settings = settings.model_copy(update={"engine": beside(settings.engine, taken_gib(), gpu_gib)})
    driver = start_driver(arguments, settings, hub_manifest, progress, interrupts, stack) if first else None
    from_rank_0(None, control)  # until then the others' weights wait on the host: the engine measures what is free
    engine = driver.engine if driver else None
    loop = Loop(
        work=arguments.work,
        training=training,
        progress=progress,
        learner=Learner(policy, optimizer, settings.optimizer),
        push_weights=lambda: push_weights(model, architecture, hub, engine, settings.engine),
        provenance=arguments.job,
        interrupts=interrupts,
        driver=driver,
        saved=saved,
        control=control,
    )
    return loop.run()


def find_checkpoint(work: Path, inputs: dict[str, str]) -> Path | None:
    """The checkpoint to go on from; `UserError` if it comes of other weights or prompts than ``inputs``."""
    saved = run_state.newest(work)
    run_state.clear(work)
    if saved and (then := run_state.read_progress(saved).inputs) != inputs:
        changed = " and ".join(name for name in inputs if then.get(name) != inputs[name])
        raise UserError(f"{work}: begun with {changed} that have changed since: move that folder away to begin anew")
    return saved


def narrator(settings: Settings) -> Callable[[str], None]:
    """What says where a start is, with the seconds since now: of one process, on GPUs, where a start takes minutes."""
    if dist.get_rank() or not settings.hardware.gpus:
        return lambda phase: None
    began = time.monotonic()
    return lambda phase: print(f"[{time.monotonic() - began:4.0f} s] {phase}", file=sys.stderr)


def gpu_memory_gib() -> float:
    """Of this process's GPU; without one there is no such limit."""
    return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else math.inf


def taken_gib() -> float:
    """What is not free of this process's GPU."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


def out_of_memory(error: RuntimeError) -> str:
    """Where a GPU's memory ran out, and what to do."""
    here = Path(__file__).parent
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(here)]
    place = f"{Path(ours[-1].filename).relative_to(here)}, line {ours[-1].lineno}"
    return (
        f"{str(error).partition(' Of the allocated memory')[0]} ({place}): lower training.max_tokens_per_gpu or"
        " engine.mem_fraction_static and run again; it goes on from the last checkpoint"
    )


def start_driver(
    arguments: argparse.Namespace,
    settings: Settings,
    hub: Manifest,
    progress: Progress,
    interrupts: Interrupts,
    stack: ExitStack,
) -> Driver:
    """What rank 0 needs besides: prompts, engine, grader, logs."""
    tokenizer = load_tokenizer(hub.root)
    stops = stop_token_ids(hub.root, tokenizer)
    data = read_manifest(arguments.data).require(digests=True)
    prompts, intake = load_prompts(data, tokenizer, settings.sampling, settings.reward.labels)
    print(f"{settings.training.dataset}: {intake}", file=sys.stderr)
    cursor = PromptCursor(prompts, settings.training.seed)
    if progress.cursor:
        cursor.restore(progress.cursor)
    problems = validation_problems(arguments, settings)
    if problems and (shared := overlap(read_manifest(arguments.data), read_manifest(arguments.validation))):
        metrics.warn(shared)
    max_requests = max(
        settings.training.prompts_per_rollout * settings.training.samples_per_prompt,
        len(problems) * settings.validation.samples_per_problem,
    )
    engine = start_engine(hub.root, settings.engine, arguments.work / "engine", max_requests)
    stack.callback(engine.close)
    engine.sleep()
    engine.wake()  # as in every step: its caches, which are not needed yet, leave their room for what sends the weights
    grader = stack.enter_context(Grader(settings.reward))
    by_another = settings.validation_reward not in (None, settings.reward)
    validation_grader = stack.enter_context(Grader(settings.validation_reward)) if by_another else grader
    log = metrics.RunLog(arguments.work, progress.rollout + 1, settings.training.wandb_project)
    stack.callback(log.close)
    bar = tqdm(total=settings.training.rollouts, initial=progress.rollout, desc="train", unit="rollout", mininterval=1)
    stack.callback(bar.close)
    return Driver(
        training=settings.training,
        algorithm=settings.algorithm,
        sampling=settings.sampling,
        stop_token_ids=stops,
        engine=engine,
        replay_routing=settings.engine.replay_routing,
        tokenizer=tokenizer,
        grader=grader,
        cursor=cursor,
        log=log,
        validate=validator(arguments, settings, problems, tokenizer, stops, validation_grader),
        validation_interval=settings.validation.interval,
        interrupts=interrupts,
        bar=bar,
    )


def validation_problems(arguments: argparse.Namespace, settings: Settings) -> list[Problem]:
    """Those of the evaluation during training; none if there is to be none."""
    if not settings.validation.interval:
        return []
    reward = settings.validation_reward or settings.reward
    return load_problems(read_manifest(arguments.validation), reward.labels)


def validation_protocol(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """What a validation score depends on besides the weights."""
    problems = read_manifest(arguments.validation)
    return {
        **settings.validation.model_dump(mode="json", exclude={"interval"}),
        "enable_thinking": settings.sampling.enable_thinking,
        "problems": sha256_of_all(problems.files),
        "prompts": problems.provenance["config"]["dataset"],  # how they are made of the problems
        "reward": (settings.validation_reward or settings.reward).model_dump(mode="json"),
        "reward_code": settings.validation_reward_code,
    }


def validator(
    arguments: argparse.Namespace,
    settings: Settings,
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerBase,
    stops: tuple[int, ...],
    grader: Grader,
) -> Callable[[RolloutEngine, int], dict[str, float]]:
    """The evaluation during training: of the weights that an engine holds, after a number of rollouts, to metrics."""
    wanted = settings.validation
    protocol = schema.Evaluation(
        datasets=[wanted.dataset],
        samples_per_problem=wanted.samples_per_problem,
        max_response_tokens=wanted.max_response_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        enable_thinking=settings.sampling.enable_thinking,
        pass_at=[1],
    )

    def validate(engine: RolloutEngine, rollout: int) -> dict[str, float]:
        samples = arguments.work / "validation" / f"{rollout:06d}.jsonl"
        samples.parent.mkdir(exist_ok=True)
        samples.unlink(missing_ok=True)  # of a run that ended before it saved these weights: perhaps not quite the same
        scores = evaluate(engine, tokenizer, stops, problems, protocol, grader, samples, {"rollout": rollout})
        names = ("average", "truncated_share", "mean_tokens")
        return {f"validation_{name}": scores[name] for name in names}

    return validate


def write_result(arguments: argparse.Namespace, checkpoint: Path) -> None:
    """The manifest of the trained weights: what the final checkpoint holds, and the logs beside it."""
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
    }
    files = weights | logs
    keep_manifest(write_manifest(arguments.manifest, "train", arguments.work, files, arguments.job, facts))


if __name__ == "__main__":
    run(main)
