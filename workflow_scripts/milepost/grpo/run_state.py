"""One atomic run state: everything that the next rollout depends on, in one folder that is either complete or absent.

    work/checkpoint-000020/
        weights/                   Megatron's distributed checkpoint
        optimizer/rank-00000.safetensors ...   each rank's optimizer state and random states
        progress.json              counters, the prompt cursor, the lengths of the logs
        groups.safetensors         responses that go on in the next rollout, if there are any
        manifest.json              written last: every file's size and sha256

A checkpoint is written under a temporary name, synced, and renamed. The newest one is found by listing the folders: no
pointer file could disagree with them. A damaged checkpoint is renamed, and so ignored.
"""

import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from milepost.checkpoints import torch_dist
from milepost.checkpoints.folders import finish_folder, partial_folder, start_folder
from milepost.checkpoints.manifest import read_manifest, write_manifest
from milepost.common.errors import UserError
from milepost.common.files import read_json, require_room, write_json
from milepost.grpo.groups import Group, save_groups
from milepost.grpo.optimizer import Optimizer

NAME = re.compile(r"checkpoint-(\d{6,})")
GROUPS = "groups.safetensors"
RANDOM_STATE = "random_state.torch"


@dataclass
class Progress:
    """The small part of a run's state: counters, the prompt cursor, and the positions in the logs.

    Attributes:
        rollout: rollouts trained on.
        optimizer_step: optimizer steps taken, without skipped ones.
        bad_steps: steps skipped since the start because the loss or a gradient was NaN or infinite.
        bad_steps_in_a_row: those since the last good step.
        cursor: the state of the prompt cursor.
        log_bytes: log file -> its length in bytes; a resumed run continues there.
        score: the validation score of these weights, or None if they were not evaluated.
        protocol: how the score was or will be measured (plain JSON); only scores of equal protocols are comparable.
        inputs: digests of the starting weights and of the prompts.
    """

    rollout: int = 0
    optimizer_step: int = 0
    bad_steps: int = 0
    bad_steps_in_a_row: int = 0
    cursor: dict[str, int] = field(default_factory=dict)
    log_bytes: dict[str, int] = field(default_factory=dict)
    score: float | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    def validation_due(self, interval: int) -> bool:
        """Whether these weights must be evaluated now: every ``interval`` rollouts, or never if it is 0."""
        return bool(interval) and self.rollout % interval == 0 and self.score is None


def folder_name(rollout: int) -> str:
    """The name of the checkpoint after ``rollout`` rollouts."""
    return f"checkpoint-{rollout:06d}"


def save(
    work: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: Optimizer,
    provenance: dict[str, Any],
    waiting: Sequence[Group] = (),
) -> Path:
    """Save the run state and return the checkpoint's folder; every rank calls this.

    Args:
        waiting: the groups that go on in the next rollout; rank 0's count.

    Raises:
        UserError: too little free disk space; raised on every rank, before anything is written.
    """
    folder = work / folder_name(progress.rollout)
    partial = partial_folder(folder)
    state = optimizer.state_dict() | {RANDOM_STATE: torch.get_rng_state()}
    if dist.get_rank() == 0:
        start_folder(partial)
        (partial / "optimizer").mkdir()
    dist.barrier()
    require_room(partial, torch_dist.whole_bytes(model) + _over_all_ranks(sum(t.nbytes for t in state.values())))
    torch_dist.save(model, partial / "weights")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, _rank_file(partial))
    dist.barrier()
    if dist.get_rank() == 0:
        write_json(partial / "progress.json", asdict(progress))
        if waiting:
            save_groups(partial / GROUPS, waiting)
        files = [str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file()]
        write_manifest(partial / "manifest.json", "checkpoint", partial, files, provenance)
        finish_folder(partial, folder)
    dist.barrier()
    return folder


def load(folder: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
    """Restore model, optimizer and random states from what `save` wrote; every rank calls this."""
    saved_by = len(list(_rank_file(folder).parent.iterdir()))
    if saved_by != dist.get_world_size():
        raise UserError(f"{folder}: saved by {saved_by} processes: resume with as many, not {dist.get_world_size()}")
    torch_dist.load(model, folder / "weights")
    state = StoredTensors(_rank_file(folder))
    torch.set_rng_state(state[RANDOM_STATE])
    optimizer.load_state_dict(state)
    return read_progress(folder)


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read on access.

    Adam's states on the CPU can fill half of a node's memory, too much for a second copy.
    """

    def __init__(self, file: Path) -> None:
        self._file = safe_open(file, framework="pt")
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_progress(folder: Path) -> Progress:
    """Read only the small part of a checkpoint."""
    return Progress(**read_json(folder / "progress.json"))


def newest(work: Path) -> Path | None:
    """The newest checkpoint whose digests match; damaged ones are set aside with a warning."""
    for folder in sorted(_named(work), key=_number, reverse=True):
        try:
            read_manifest(folder / "manifest.json").require(digests=True)
        except UserError as error:
            print(f"warning: {folder.name} is damaged and set aside: {error}", file=sys.stderr)
            _remove(folder)
            continue
        return folder
    return None


def best(work: Path) -> Path | None:
    """The checkpoint with the highest validation score, the earliest if several have it; None if none was evaluated.

    Only checkpoints that were evaluated by the same protocol as the last one are compared.
    """
    found = {folder: read_progress(folder) for folder in sorted(_named(work), key=_number)}
    evaluated = {folder: progress for folder, progress in found.items() if progress.score is not None}
    last = next(reversed(evaluated.values()), None)
    alike = {folder: progress.score for folder, progress in evaluated.items() if progress.protocol == last.protocol}
    return max(alike, key=alike.__getitem__, default=None)


def prune(work: Path, keep: int) -> None:
    """Keep the last ``keep`` checkpoints and the best one; delete the others, and all that were set aside.

    Call it only after a new checkpoint is complete: until then the run depends on the old ones.
    """
    stay = {*sorted(_named(work), key=_number)[-keep:], best(work)}
    for folder in set(_named(work)) - stay:
        _remove(folder)
    for left in work.glob(".checkpoint-*"):
        shutil.rmtree(left)


def clear(work: Path) -> None:
    """Delete partial checkpoints of a stopped run: the next one may need the disk space."""
    for left in work.glob(partial_folder("checkpoint-*").name):
        shutil.rmtree(left)


def _named(work: Path) -> Iterator[Path]:
    return (folder for folder in work.iterdir() if NAME.fullmatch(folder.name) and folder.is_dir())


def _remove(folder: Path) -> None:
    """Rename a checkpoint, which is atomic, so that it is ignored; `prune` deletes it."""
    away = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(away, ignore_errors=True)
    folder.rename(away)


def _number(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name).group(1))


def _rank_file(folder: Path) -> Path:
    return folder / "optimizer" / f"rank-{dist.get_rank():05d}.safetensors"


def _over_all_ranks(number: int) -> int:
    """The sum of ``number`` over all ranks."""
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)
