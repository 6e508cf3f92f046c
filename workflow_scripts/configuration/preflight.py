"""Does this machine have what a recipe needs? Asked before the first job starts, and by ``snakemake preflight``."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import free_bytes
from configuration.gpus import visible_gpus
from configuration.loading import Configuration
from configuration.memory import GIB, disk_gib, estimate
from configuration.provenance import Provenance
from configuration.schema import Model, Source
from configuration.shape import architecture_of

GPU_PACKAGES = ("sglang", "fla", "tilelang")
COMPILERS = ("gcc", "clang")  # with one of them Triton builds what starts its kernels
CUDA_TOOLKIT = "/usr/local/cuda"  # where SGLang looks for one last, to build some of its kernels
HEAVY = {"train", "evaluate"}  # the stages that take the recipe's GPUs and host memory


@dataclass(frozen=True)
class Machine:
    """What there is: memory of every visible GPU in GiB, host memory, and free disk for the results."""

    gpus: tuple[float, ...]
    host_memory_gib: float
    free_disk_gib: float
    missing_packages: tuple[str, ...]
    has_compiler: bool = True
    has_cuda_toolkit: bool = True

    @classmethod
    def here(cls, results: str) -> "Machine":
        return cls(
            gpus=visible_gpus(),
            host_memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
            free_disk_gib=free_bytes(results) / GIB,
            missing_packages=tuple(name for name in GPU_PACKAGES if importlib.util.find_spec(name) is None),
            has_compiler="CC" in os.environ or any(map(shutil.which, COMPILERS)),
            has_cuda_toolkit=_has_cuda_toolkit(),
        )


def _has_cuda_toolkit() -> bool:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not named and shutil.which("nvcc"):
        return True
    return Path(named or CUDA_TOOLKIT, "bin", "nvcc").is_file()


def check_jobs(
    jobs: Iterable[tuple[str, dict[str, str]]], configuration: Configuration, provenance: Provenance
) -> None:
    """Refuse, in one line, to start jobs that this machine can't finish; with ``preflight: warn``, say so and go on.

    Args:
        jobs: (rule, wildcards) of every job that is about to run.
    """
    jobs = [*jobs]
    for rule, wildcards in jobs:
        if rule == "download":
            _require(configuration.models[wildcards["model"]].source, wildcards["model"])
        elif rule == "dataset":
            _require(configuration.datasets[wildcards["name"]], wildcards["name"])
    jobs = [(rule, wildcards["model"]) for rule, wildcards in jobs if "model" in wildcards]
    if not jobs:
        return
    machine = Machine.here(configuration.results)
    faults = []
    for name in sorted({model for _, model in jobs}):
        model = configuration.models[name]
        if stages := HEAVY & {rule for rule, of in jobs if of == name}:
            faults += [f"{name} {fault}" for fault in shortcomings(model, machine, stages)]
    disk = sum(_disk_to_take_gib(configuration, provenance, model, rule) for rule, model in jobs)
    if disk > machine.free_disk_gib:
        faults.append(f"the results need about {disk:.0f} GiB of disk and {machine.free_disk_gib:.0f} are free")
    if faults and configuration.preflight == "warn":
        print(f"warning: {'; '.join(faults)}", file=sys.stderr)
    elif faults:
        raise UserError(f"{'; '.join(faults)} (`preflight: warn` in the configuration starts it anyway)")


def _require(source: Source, name: str) -> None:
    """Its own folder, and there a problem set's file."""
    if source.folder:
        wanted = Path(source.folder).expanduser() / getattr(source, "file", "")
        if not wanted.exists():
            raise UserError(f"{name}: {wanted}: no such file or folder")


def _disk_to_take_gib(configuration: Configuration, provenance: Provenance, model: str, stage: str) -> float:
    """`disk_gib` less what is taken already: by the checkpoints, whole or not, of a training that will go on."""
    disk = disk_gib(configuration.models[model], stage)
    if stage != "train":
        return disk
    work = provenance.run(model)
    taken = sum(file.stat().st_size for file in work.glob("*checkpoint-*/**/*") if file.is_file()) if work else 0
    return max(disk - taken / GIB, 0)


def shortcomings(model: Model, machine: Machine, stages: Set[str] = HEAVY) -> list[str]:
    """What one recipe's ``stages`` lack on this machine, each as words that follow the model's name."""
    hardware, faults = model.hardware, []
    if hardware.gpus > len(machine.gpus):
        gpus = "1 GPU" if hardware.gpus == 1 else f"{hardware.gpus} GPUs"
        faults.append(f"needs {gpus} and this machine has {len(machine.gpus) or 'none'}")
    if hardware.host_memory_gib > machine.host_memory_gib:
        faults.append(f"needs {hardware.host_memory_gib} GiB of memory and there are {machine.host_memory_gib:.0f}")
    if hardware.gpus and machine.missing_packages:
        faults.append(
            f"needs {', '.join(machine.missing_packages)}, not installed: run `make setup` on the GPU machine"
        )
    if hardware.gpus and not machine.has_compiler:
        faults.append(f"needs a C compiler, {' or '.join(COMPILERS)}: install one, or name yours in the variable CC")
    if hardware.gpus and not machine.has_cuda_toolkit:
        faults.append("needs a CUDA toolkit (nvcc), with which SGLang builds kernels: install one, or set CUDA_HOME")
    if hardware.gpus and machine.gpus and (architecture := architecture_of(model)):
        memory = min(machine.gpus)
        needed = estimate(architecture, model, memory)
        if "train" in stages and max(needed.training, needed.rollout) > memory:
            faults.append(
                f"needs about {needed.training:.0f} GiB a GPU to train and {needed.rollout:.0f} to roll out, and the"
                f" smallest has {memory:.0f}: lower training.max_tokens_per_gpu or engine.mem_fraction_static, or raise"
                " parallel.tensor"
                " (a pack holds at least one whole answer, of sampling.max_response_tokens)"
            )
        for stage, section in (("train", "engine"), ("evaluate", "evaluation")):
            share = getattr(model, section).mem_fraction_static * memory
            if stage in stages and needed.engine_weights > share:
                faults.append(
                    f"needs {needed.engine_weights:.1f} GiB of each GPU for the engine's weights, and"
                    f" {section}.mem_fraction_static gives the engine {share:.1f} of {memory:.0f}:"
                    " raise it, or engine.gpus_per_engine"
                )
    return faults


def table(configuration: Configuration) -> str:
    """What every listed model needs, beside what is here, for a person to read."""
    machine = Machine.here(configuration.results)
    gpus = "no GPU (estimated for hardware.gpu_memory_gib)"
    if machine.gpus:
        gpus = f"{len(machine.gpus)} GPUs of {min(machine.gpus):.0f} GiB"
    lines = [
        f"here: {gpus}, {machine.host_memory_gib:.0f} GiB of memory, {machine.free_disk_gib:.0f} GiB of disk free",
        "",
        f"{'':10}{'GPUs':>5}{'weights':>9}{'grads':>7}{'Adam':>7}{'activ.':>8}{'logits':>8}{'training':>10}{'rollout':>9}"
        f"{'recompute':>11}{'host':>7}{'disk':>7}   GiB; weights to rollout are of one rank",
    ]
    lacking: dict[str, list[str]] = {}
    for name in configuration.listed:
        model = configuration.models[name]
        disk = sum(disk_gib(model, stage) for stage in ("download", "convert", "train", "export"))
        if model.hardware.gpus and (architecture := architecture_of(model)):
            memory = min(machine.gpus) if machine.gpus else model.hardware.gpu_memory_gib
            m = estimate(architecture, model, memory)
            columns = f"{m.weights:9.1f}{m.gradients:7.1f}{m.optimizer:7.1f}{m.activations:8.1f}{m.logits:8.1f}"
            columns += f"{m.training:10.1f}{m.rollout:9.1f}{m.recompute:>11}"
        else:
            columns = f"{'not estimated: no architecture' if model.hardware.gpus else '':>69}"
        faults = shortcomings(model, machine)
        if disk > machine.free_disk_gib:
            faults.append(f"needs {disk:.0f} GiB of disk")
        for fault in faults:
            lacking.setdefault(fault, []).append(name)
        lines.append(
            f"{name:10}{model.hardware.gpus:5}{columns}{model.hardware.host_memory_gib:7}{disk:7.0f}"
            f"   {'lacks what is named below' if faults else 'ready'}"
        )
    return "\n".join([*lines, "", *(f"{', '.join(names)}: {fault}" for fault, names in lacking.items())]).rstrip()
