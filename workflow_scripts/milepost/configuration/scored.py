"""What decides a score, of all that an evaluation's record holds, and what two scores must share to be compared."""

from typing import Any

from milepost.configuration.evaluation import RESOURCES

# What an evaluation runs on: the record holds it, but a change makes no score stale.
RUNS_ON = {
    "hardware": None,
    "evaluation": {*RESOURCES},
    "engine": {"gpus_per_engine", "expert_parallel", "max_running_requests", "cuda_graph_batch_sizes"},
}


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's recorded settings without those of what it ran on."""
    return without(config, RUNS_ON)


def without(config: dict[str, Any], left_out: dict[str, set[str] | None]) -> dict[str, Any]:
    """Leave out some keys of some sections; None leaves out the whole section."""
    return {
        name: {key: value for key, value in section.items() if key not in (left_out.get(name) or ())}
        for name, section in config.items()
        if left_out.get(name, ()) is not None
    }
