"""What decides a score, of all that an evaluation's record holds, and what two scores must share to be compared."""

from typing import Any

from milepost.configuration.evaluation import RESOURCES
from milepost.configuration.runs import CONTINUES

# What an evaluation runs on: the record holds it, but a change makes no score stale.
RUNS_ON = {
    "hardware": None,
    "evaluation": {*RESOURCES},
    "engine": {"gpus_per_engine", "expert_parallel", "max_running_requests", "cuda_graph_batch_sizes"},
}
# Two scores of the same problems estimate comparable means whatever these are.
MAY_DIFFER = {
    "evaluation": {*RESOURCES, "datasets", "samples_per_problem", "pass_at", "bootstrap_samples", "seed"},
    "reward": CONTINUES["reward"],
}
# Of these a note says where they differ: they leave the distribution of the samples as it is, or are meant to.
NOTED = {
    "evaluation": {"samples_per_problem", "seed"},
    "engine": {"kind", "gpus_per_engine", "expert_parallel", "speculation", "server_arguments"},
}


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's recorded settings without those of what it ran on."""
    return without(config, RUNS_ON)


def shared(config: dict[str, Any]) -> dict[str, Any]:
    """The part of an evaluation's recorded settings that comparable scores share: protocol and reward."""
    kept = {name: config.get(name) or {} for name in ("evaluation", "reward", "reward_code")}
    return without(kept, MAY_DIFFER)


def noted(config: dict[str, Any]) -> dict[str, Any]:
    """The part of an evaluation's recorded settings of which a comparison notes the differences."""
    return {
        name: {key: value for key, value in config.get(name, {}).items() if key in keys} for name, keys in NOTED.items()
    }


def without(config: dict[str, Any], left_out: dict[str, set[str] | None]) -> dict[str, Any]:
    """Leave out some keys of some sections; None leaves out the whole section."""
    return {
        name: {key: value for key, value in section.items() if key not in (left_out.get(name) or ())}
        for name, section in config.items()
        if left_out.get(name, ()) is not None
    }
