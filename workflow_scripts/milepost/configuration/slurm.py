"""Check whether a Slurm partition has nodes for the jobs, as far as sinfo knows."""

import re
import subprocess
from collections.abc import Set
from dataclasses import dataclass

from milepost.configuration import layout
from milepost.configuration.memory import asked_gib
from milepost.configuration.schema import Model

GPUS = re.compile(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)")  # gpu:8 or gpu:h100:8(S:0-1), in a list separated by commas
HEAVY = {"train", "evaluate"}  # the jobs that ask for the recipe's GPUs and cores


@dataclass(frozen=True)
class Node:
    gpus: int
    memory_gib: float
    cores: int


def nodes_of(partition: str | None) -> list[Node]:
    """The nodes of a partition (None: the default partition), up or not; empty if sinfo does not answer."""
    chosen = ["--partition", partition] if partition else []
    command = ["sinfo", "--noheader", "--Node", *chosen, "--format", "%P|%G|%m|%c"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    nodes = []
    for line in answer.splitlines():
        fields = [field.strip().removesuffix("+") for field in line.split("|")]
        if len(fields) == 4 and fields[2].isdecimal() and fields[3].isdecimal():
            name, gpus, mebibytes, cores = fields
            if partition or name.endswith("*"):  # the default partition
                nodes.append(Node(sum(map(int, GPUS.findall(gpus))), int(mebibytes) / 1024, int(cores)))
    return nodes


def called(partition: str | None) -> str:
    return f"Slurm's partition {partition}" if partition else "Slurm's default partition"


def shortcomings(model: Model, stages: Set[str], partition: str | None, nodes: list[Node]) -> list[str]:
    """What the jobs of ``stages`` ask for and no node of ``partition`` has, as phrases that follow the model's name."""
    hardware, evaluation, where = model.hardware, model.evaluation, f"the nodes of {called(partition)}"
    alone = stages == {"evaluate"}
    gpus = "evaluation.gpus" if alone and evaluation.gpus else "hardware.gpus"
    memory = "evaluation.host_memory_gib" if alone else "hardware.host_memory_gib"
    faults = []
    for wanted, unit, key, has in (
        (max(layout.gpus(model, stage) for stage in stages), "GPUs", gpus, lambda node: node.gpus),
        (max(asked_gib(model, stage) for stage in stages), "GiB of memory", memory, lambda node: node.memory_gib),
        (hardware.cores if HEAVY & stages else 0, "cores", "hardware.cores", lambda node: node.cores),
    ):
        fitting = [node for node in nodes if has(node) >= wanted]
        if not fitting:
            faults.append(f"asks for {wanted} {unit} ({key}), and {where} have at most {max(map(has, nodes)):.0f}")
        elif len(fitting) < len(nodes):  # one node must have all of it
            nodes, where = fitting, f"{where} with {wanted} {unit}"
    return faults
