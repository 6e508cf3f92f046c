"""The installed versions of the packages that results depend on."""

import importlib.metadata
from collections.abc import Iterable

SAMPLING = ("torch", "transformers", "sglang", "flash-linear-attention")
GRADING = ("sympy",)
CONVERTING = ("torch", "megatron-core", "safetensors")
TRAINING = (*SAMPLING, *GRADING, "megatron-core")
STATISTICS = ("numpy", "scipy")
RECORDED = (*TRAINING, *STATISTICS, "safetensors", "snakemake")


def versions(packages: Iterable[str] = RECORDED) -> dict[str, str]:
    """Package -> version, for the installed ones."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
