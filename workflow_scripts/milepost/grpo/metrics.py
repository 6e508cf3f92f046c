"""The logs of a run: metrics.jsonl, samples.jsonl, TensorBoard, and Weights & Biases if configured."""

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from milepost.common.errors import UserError
from milepost.common.files import json_line
from milepost.configuration.early import require_wandb
from milepost.grpo.settings import Settings

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
SHOWN, TAIL = 3, 160  # samples that a warning shows, and the final characters of each
# Groups of metrics in TensorBoard and W&B, by how the names begin; all others are of the loss.
GROUPS = {
    "reward": ("reward_", "pass_rate", "grading_", "groups_", "prompts", "replaced_"),
    "length": ("response_length", "truncated_", "overlong_"),
    "validation": ("validation_",),
    "seconds": ("seconds_", "tokens_per_second", "idle_share"),
    "engine": ("log_prob_diff", "engine_kl", "acceptance_", "carried_", "token_age"),
    "experts": ("expert_", "routing_"),
    "memory": ("host_memory", "gpu_memory"),
}


class JsonLines:
    """A log with one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        """Write one line; NaN and infinite numbers, which JSON lacks, become null."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.file.write(json_line(clean))
        self.file.flush()

    def read(self) -> list[dict[str, Any]]:
        """All lines so far."""
        with open(self.file.name, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def sync(self) -> int:
        """Sync the file to disk and return its length in bytes."""
        self.file.flush()  # raises again if an earlier line could not be written: the length would count it
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()


class RunLog:
    """All logs of one run, in its work folder; only rank 0 has them."""

    def __init__(self, work: Path, first_rollout: int, settings: Settings) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self.lines = {name: JsonLines(work / name) for name in (METRICS, SAMPLES)}
        self.tensorboard = SummaryWriter(str(work / "tensorboard"), purge_step=first_rollout)
        config = settings.model_dump(mode="json")
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        # At each start: a run that goes on may have another length or other validations.
        self.tensorboard.add_text("settings", f"```\n{text}```", first_rollout - 1)
        project = settings.training.wandb_project
        self.wandb = _start_wandb(project, work, config) if project else None

    def metrics(self, rollout: int, values: dict[str, float | int]) -> None:
        """Write the ``values`` of ``rollout`` to all logs."""
        self.lines[METRICS].append({"rollout": rollout, **values})
        grouped = {tag(name): value for name, value in values.items()}
        for name, value in grouped.items():
            self.tensorboard.add_scalar(name, value, rollout)
        if self.wandb:
            self.wandb.log({"rollout": rollout, **grouped})

    def sample(self, row: dict[str, Any]) -> None:
        """Write one sample to samples.jsonl."""
        self.lines[SAMPLES].append(row)

    def sync(self) -> dict[str, int]:
        """Sync the logs to disk and return their lengths in bytes, for the checkpoint."""
        self.tensorboard.flush()
        return {name: lines.sync() for name, lines in self.lines.items()}

    def close(self) -> None:
        for lines in self.lines.values():
            lines.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def tag(metric: str) -> str:
    """A metric's name in TensorBoard and W&B, which sort by what stands before the slash: ``reward/reward_mean``."""
    return f"{next((group for group, starts in GROUPS.items() if metric.startswith(starts)), 'loss')}/{metric}"


def equal_rewards(log: RunLog) -> str | None:
    """A warning, with some of the samples, if all rewards so far are equal; None if they differ."""
    rows = [row for row in log.lines[METRICS].read() if "reward_mean" in row]
    rewards = {row[name] for row in rows for name in ("reward_min", "reward_max")}
    if len(rewards) != 1:
        return None
    samples = log.lines[SAMPLES].read()
    first_of_reason = {row["reason"]: number for number, row in reversed([*enumerate(samples)])}
    rest = (number for number in range(len(samples)) if number not in first_of_reason.values())
    shown = [samples[number] for number in [*sorted(first_of_reason.values()), *rest][:SHOWN]]
    lines = [
        f"every reward of rollouts 1 to {samples[-1]['rollout']} is {rewards.pop():g}, and equal rewards teach"
        " nothing; training goes on. Check that the prompts ask for what the reward grades, and the labels:"
    ]
    lines += [
        f"  {row.get('dataset', '')} {row.get('place', '')}, label {row['label']!r}: {row['reason']},"
        f" answer {row['answer']!r}, the response ends {row['response'][-TAIL:]!r}"
        for row in shown
    ]
    return "\n".join(lines)


def expert_metrics(load: Tensor | None, agreement: float | None) -> dict[str, float]:
    """How evenly the experts are used.

    Args:
        load: (layers, experts) tokens routed to each expert; None for a dense model.
        agreement: the share of the engine's choices of experts that the trainer's router agrees with, or None.

    Returns:
        means over the layers: ``expert_load_max`` and ``expert_load_min``, the load of the busiest and of the least
        busy expert over the mean load, and ``expert_imbalance``, the loads' standard deviation over their mean; and
        ``agreement`` as ``routing_agreement``.
    """
    if load is None:
        return {}
    share = load / load.double().mean(dim=1, keepdim=True)
    return {
        "expert_load_max": share.amax(dim=1).mean().item(),
        "expert_load_min": share.amin(dim=1).mean().item(),
        "expert_imbalance": share.std(dim=1, correction=0).mean().item(),
        **({} if agreement is None else {"routing_agreement": agreement}),
    }


def peak_memory() -> dict[str, float]:
    """Peak memory in GiB; every rank calls this.

    ``host_memory_gib`` is the sum of all ranks' peaks since they started. ``gpu_memory_gib``, left out on the CPU, is
    the peak of allocated tensors since the last call, on the rank where it is highest.
    """
    host = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20], dtype=torch.float64)  # from KiB
    dist.all_reduce(host)
    peaks = {"host_memory_gib": host.item()}
    if torch.cuda.is_available():
        gpu = torch.tensor([torch.cuda.max_memory_allocated() / 2**30], dtype=torch.float64)
        dist.all_reduce(gpu, dist.ReduceOp.MAX)
        torch.cuda.reset_peak_memory_stats()
        peaks["gpu_memory_gib"] = gpu.item()
    return peaks


def truncate_logs(work: Path, log_bytes: dict[str, int]) -> None:
    """Truncate the logs to their lengths in a checkpoint, so that a resumed run logs no rollout twice."""
    for name in (METRICS, SAMPLES):
        length = log_bytes.get(name, 0)
        with (work / name).open("ab") as file:
            if file.tell() < length:
                raise UserError(f"{work / name}: {file.tell()} of {length} bytes left: put it back, or delete {work}")
            file.truncate(length)


def warn(message: str) -> None:
    """Print a warning above the progress bar, on rank 0 only; every rank may call this."""
    from tqdm import tqdm

    if dist.get_rank() == 0:
        tqdm.write(f"warning: {message}", file=sys.stderr)


def _start_wandb(project: str, work: Path, config: dict[str, Any]) -> Any:
    """Log to the W&B run of this folder, which a resumed run continues; its name is model/run/folder."""
    require_wandb()
    import wandb

    model, _, run, folder = work.absolute().parts[-4:]
    settings = {"config": config, "name": f"{model}/{run}/{folder}"}
    log = wandb.init(project=project, id=folder, dir=work, resume="allow", **settings)
    log.define_metric("*", step_metric="rollout")  # W&B's own step can't go back, but a resumed run does
    return log
