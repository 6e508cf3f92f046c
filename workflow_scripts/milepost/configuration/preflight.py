"""Compare what a recipe needs with what this machine has: before the first job, and in ``snakemake preflight``."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from milepost.common.errors import UserError
from milepost.common.files import free_bytes
from milepost.configuration import layout, slurm
from milepost.configuration.cgroups import installed_memory, usable_cores, usable_memory
from milepost.configuration.gpus import visible_gpus
from milepost.configuration.loading import Configuration
from milepost.configuration.memory import GIB, disk_gib, engine_weights_gib, estimate, host_gib
from milepost.configuration.provenance import Provenance
from milepost.configuration.schema import Model
from milepost.configuration.shape import architecture_of

GPU_PACKAGES = ("sglang", "fla", "tilelang")
COMPILERS = ("gcc", "clang")  # Triton compiles its kernel launchers with one of them
CUDA_TOOLKIT = "/usr/local/cuda"  # the last place where SGLang looks for one, to build some of its kernels
HEAVY = {"train", "evaluate"}  # the stages that take the recipe's GPUs
PURPOSES = {"train": "", **{stage: f" to {stage}" for stage in ("evaluate", "convert", "export")}}  # in errors
NODES = {"8 x 80 GB": 81559 / 1024, "8 x 141 GB": 143771 / 1024}  # GiB per GPU, as nvidia-smi reports for H100 and H200


@dataclass(frozen=True)
class Machine:
    """What this machine has.

    Attributes:
        gpus: memory of each visible GPU in GiB; None if the driver does not report it.
        host_memory_gib: memory of the machine, or the limit of its cgroup if that is lower.
        free_disk_gib: free space on the disk of the results.
        missing_packages: those that the GPU path needs and that are not installed.
        free_cache_gib: free space on the disk of the Hub's cache; None if the results lie on the same disk.
        is_limited: whether a cgroup limits the memory.
    """

    gpus: tuple[float | None, ...]
    host_memory_gib: float
    free_disk_gib: float
    missing_packages: tuple[str, ...]
    has_compiler: bool = True
    has_cuda_toolkit: bool = True
    free_cache_gib: float | None = None
    is_limited: bool = False

    @classmethod
    def here(cls, results: str) -> "Machine":
        usable = usable_memory()
        return cls(
            gpus=visible_gpus(),
            host_memory_gib=usable / GIB,
            free_disk_gib=free_bytes(results) / GIB,
            missing_packages=tuple(name for name in GPU_PACKAGES if importlib.util.find_spec(name) is None),
            has_compiler="CC" in os.environ or any(map(shutil.which, COMPILERS)),
            has_cuda_toolkit=_has_cuda_toolkit(),
            free_cache_gib=None if _disk(hub_cache()) == _disk(results) else free_bytes(hub_cache()) / GIB,
            is_limited=usable < installed_memory(),
        )

    def gpu_memory_gib(self, model: Model) -> float:
        """Memory of the smallest GPU; as configured if there is no GPU, or its driver does not report it."""
        return min((gib for gib in self.gpus if gib), default=model.hardware.gpu_memory_gib)


@dataclass(frozen=True)
class Disk:
    """Disk space in GiB for the results, and for downloads in the Hub's cache."""

    results: float
    cache: float


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads, by the rules of its constants.py, which takes long to import."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    hub = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return Path(os.path.expanduser(os.path.expandvars(os.environ.get("HF_HUB_CACHE", hub))))


def _disk(folder: Path | str) -> int:
    """The device number of the file system that ``folder`` is on, or will be on."""
    folder = Path(folder).absolute()
    return next(place for place in (folder, *folder.parents) if os.path.exists(place)).stat().st_dev


def _has_cuda_toolkit() -> bool:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not named and shutil.which("nvcc"):
        return True
    return Path(named or CUDA_TOOLKIT, "bin", "nvcc").is_file()


def check_jobs(
    jobs: Iterable[tuple[str, dict[str, str]]],
    configuration: Configuration,
    provenance: Provenance,
    partitions: Mapping[str, str | None] | None = None,
) -> None:
    """Refuse (`UserError`) jobs that this machine can't finish; with ``preflight: warn`` only print a warning.

    Args:
        jobs: (rule, wildcards) of every job that is about to run.
        partitions: rule -> the Slurm partition that its jobs are sent to; None if jobs run on this machine.
    """
    jobs = [(rule, wildcards["model"]) for rule, wildcards in jobs if "model" in wildcards]
    if not jobs:
        return
    machine = Machine.here(configuration.results)
    faults = []
    checked = [(rule, model) for rule, model in jobs if rule in PURPOSES]
    nodes = None if partitions is None else _nodes({partitions.get(rule) for rule, _ in checked})
    for name in sorted({model for _, model in checked}):
        model, stages = configuration.models[name], {rule for rule, of in checked if of == name}
        if nodes is None:
            found = shortcomings(model, machine, stages)
        else:
            found = [
                fault
                for partition in sorted(nodes, key=str)
                if (sent := {stage for stage in stages if partitions.get(stage) == partition}) and nodes[partition]
                for fault in slurm.shortcomings(model, sent, partition, nodes[partition])
            ]
        faults += [f"{name} {fault}" for fault in found]
    faults += _of_disks(_disk_to_take_gib(configuration, provenance, jobs), machine)
    if faults and configuration.preflight == "warn":
        print(f"warning: {'; '.join(faults)}", file=sys.stderr)
    elif faults:
        raise UserError(f"{'; '.join(faults)} (`preflight: warn` in the configuration starts it anyway)")


def _nodes(partitions: Set[str | None]) -> dict[str | None, list[slurm.Node]]:
    """The nodes of each partition. Prints for each what could be checked."""
    nodes = {partition: slurm.nodes_of(partition) for partition in sorted(partitions, key=str)}
    for partition, found in nodes.items():
        told = "not checked, since sinfo names none"
        if found:
            told = "checked for GPUs, memory and cores; what a GPU holds and what is installed there was not asked"
        print(f"preflight: the nodes of {slurm.called(partition)} were {told}", file=sys.stderr)
    return nodes


def _of_disks(needed: Disk, machine: Machine) -> list[str]:
    """The disk space that is missing: for results and the Hub's cache separately, or together if they share a disk."""
    if machine.free_cache_gib is None:
        needed = Disk(needed.results + needed.cache, 0)
    faults = []
    if needed.results > machine.free_disk_gib:
        faults.append(
            f"the results need about {needed.results:.0f} GiB of disk and {machine.free_disk_gib:.0f} are free"
        )
    if needed.cache > (machine.free_cache_gib or 0):
        variable = "HF_HUB_CACHE" if "HF_HUB_CACHE" in os.environ else "HF_HOME"
        faults.append(
            f"the downloads need about {needed.cache:.0f} GiB of disk and {machine.free_cache_gib:.0f} are free in the"
            f" Hub's cache {hub_cache()}: make room, or set {variable} to a folder on a larger disk"
        )
    return faults


def _disk_to_take_gib(configuration: Configuration, provenance: Provenance, jobs: Iterable[tuple[str, str]]) -> Disk:
    """Disk space that all jobs still need: `disk_gib` of each, minus what is on the disk already.

    Already there are the checkpoints, complete or not, of a training that continues, and the complete files of a
    repository in the cache, even those of another commit: the download checks again before it fetches weights.
    """
    results = cache = 0.0
    for stage, name in jobs:
        model = configuration.models[name]
        disk = disk_gib(model, stage)
        if stage == "download" and model.source.repo:
            blobs = hub_cache() / f"models--{model.source.repo.replace('/', '--')}" / "blobs"
            cache += max(disk - _bytes(blobs, "*") / GIB, 0)
        elif stage == "train":
            work = provenance.run(name)
            results += max(disk - (_bytes(work, "*checkpoint-*/**/*") / GIB if work else 0), 0)
        else:
            results += disk
    return Disk(results, cache)


def _bytes(folder: Path, pattern: str) -> int:
    files = (file for file in folder.glob(pattern) if file.is_file() and file.suffix != ".incomplete")
    return sum(file.stat().st_size for file in files)


def shortcomings(model: Model, machine: Machine, stages: Set[str] = HEAVY) -> list[str]:
    """What this machine lacks for ``stages`` (of `PURPOSES`) of one recipe, as phrases that follow the model's name."""
    faults = []
    gpus, stage = max((layout.gpus(model, stage), stage) for stage in stages)
    if gpus > len(machine.gpus):
        hint = ": lower evaluation.gpus" if stage == "evaluate" and machine.gpus else ""
        faults.append(f"needs {gpus} GPU{'s' * (gpus > 1)} and this machine has {len(machine.gpus) or 'none'}{hint}")
    needed, purpose = max((host_gib(model, stage), PURPOSES[stage]) for stage in stages)
    if needed > machine.host_memory_gib:
        limit = ", the cgroup's limit" if machine.is_limited else ""
        faults.append(f"needs {needed:.0f} GiB of memory{purpose} and there are {machine.host_memory_gib:.0f}{limit}")
    if gpus and machine.missing_packages:
        faults.append(
            f"needs {', '.join(machine.missing_packages)}, not installed: run `make setup` on the GPU machine"
        )
    if gpus and not machine.has_compiler:
        faults.append(f"needs a C compiler, {' or '.join(COMPILERS)}: install one, or name yours in the variable CC")
    if gpus and not machine.has_cuda_toolkit:
        faults.append("needs a CUDA toolkit (nvcc), with which SGLang builds kernels: install one, or set CUDA_HOME")
    if gpus and machine.gpus:
        faults += _of_gpu_memory(model, machine.gpu_memory_gib(model), stages)
    return faults


def _of_gpu_memory(model: Model, memory: float, stages: Set[str]) -> list[str]:
    """What ``stages`` lack if the smallest GPU has ``memory`` GiB; nothing if the model's shape is unknown."""
    if (architecture := architecture_of(model)) is None:
        return []
    faults = []
    if "train" in stages:
        needed = estimate(architecture, model, memory)
        if max(needed.training, needed.rollout) > memory:
            faults.append(
                f"needs about {needed.training:.0f} GiB a GPU to train and {needed.rollout:.0f} to roll out, and the"
                f" smallest has {memory:.0f}: lower training.max_tokens_per_gpu or engine.mem_fraction_static, or raise"
                " parallel.tensor"
                " (a pack holds at least one whole answer, of sampling.max_response_tokens)"
            )
    for stage, section, engine in (
        ("train", "engine", model.engine),
        ("evaluate", "evaluation", model.evaluation_engine),
    ):
        weights, share = engine_weights_gib(architecture, engine), engine.mem_fraction_static * memory
        if stage in stages and weights > share:
            faults.append(
                f"needs {weights:.1f} GiB of each GPU for the engine's weights, and"
                f" {section}.mem_fraction_static gives the engine {share:.1f} of {memory:.0f}:"
                f" raise it, or {section}.gpus_per_engine"
            )
    return faults


def table(configuration: Configuration) -> str:
    """A table for people: what this machine has, what each listed model needs, and which other nodes would do."""
    machine = Machine.here(configuration.results)
    lines = [
        _here(machine),
        "",
        f"{'':10}{'GPUs':>5}{'weights':>9}{'grads':>7}{'Adam':>7}{'activ.':>8}{'logits':>8}{'training':>10}{'rollout':>9}"
        f"{'recompute':>11}{''.join(f'{node:>16}' for node in NODES)}{'host':>7}{'disk':>7}"
        "   GiB; weights to rollout are of one rank; whether other GPUs hold it, and what is recomputed there",
    ]
    lacking: dict[str, list[str]] = {}
    for name in configuration.listed:
        model = configuration.models[name]
        disk = Disk(
            sum(disk_gib(model, stage) for stage in ("convert", "train", "export")), disk_gib(model, "download")
        )
        columns, reasons = _columns(model, machine)
        faults = [*shortcomings(model, machine, PURPOSES.keys()), *_of_disks(disk, machine)]
        for fault in (*faults, *reasons):
            lacking.setdefault(fault, []).append(name)
        lines.append(
            f"{name:10}{model.hardware.gpus:5}{columns}{model.hardware.host_memory_gib:7}"
            f"{disk.results + disk.cache:7.0f}   {'lacks what is named below' if faults else 'ready'}"
        )
    return "\n".join([*lines, "", *(f"{', '.join(names)}: {fault}" for fault, names in lacking.items())]).rstrip()


def _here(machine: Machine) -> str:
    gpus, known = "no GPU (estimated for hardware.gpu_memory_gib)", [gib for gib in machine.gpus if gib]
    if machine.gpus:
        gpus = f"{len(machine.gpus)} GPUs of "
        gpus += f"{min(known):.0f} GiB" if known else "unknown memory (estimated for hardware.gpu_memory_gib)"
    limit = " (the cgroup's limit)" if machine.is_limited else ""
    cache = f", {machine.free_cache_gib:.0f} in the Hub's cache" if machine.free_cache_gib is not None else ""
    return (
        f"here: {gpus}, {machine.host_memory_gib:.0f} GiB of memory{limit}, {usable_cores()} cores,"
        f" {machine.free_disk_gib:.0f} GiB of disk free{cache}"
    )


def _columns(model: Model, machine: Machine) -> tuple[str, list[str]]:
    """The columns of estimates and of verdicts on `NODES`, and the reason for each "no"."""
    if not model.hardware.gpus:
        return " " * (69 + 16 * len(NODES)), []
    if (architecture := architecture_of(model)) is None:
        return f"{'not estimated: no architecture':>69}" + f"{'unknown':>16}" * len(NODES), []
    m = estimate(architecture, model, machine.gpu_memory_gib(model))
    columns = f"{m.weights:9.1f}{m.gradients:7.1f}{m.optimizer:7.1f}{m.activations:8.1f}{m.logits:8.1f}"
    columns += f"{m.training:10.1f}{m.rollout:9.1f}{m.recompute:>11}"
    reasons = []
    for node, memory in NODES.items():
        faults = _of_gpu_memory(model, memory, HEAVY)
        verdict = "no" if faults else f"yes, {estimate(architecture, model, memory).recompute}"
        columns += f"{verdict:>16}"
        reasons += [f"on {node}: {fault}" for fault in faults]
    return columns, reasons
