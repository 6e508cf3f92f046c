"""Check that the weights to show or compare exist, when a target asks for tables, plots or the report.

The settings ``runs`` and ``compare`` name finished runs. Other targets, such as the training that makes one of those
runs, do not need them.
"""

from milepost.common.errors import UserError
from milepost.configuration import scoring, staleness
from milepost.configuration.loading import Configuration
from milepost.configuration.weights import BASE, finished_runs, run_of


def check_shown(configuration: Configuration) -> None:
    """Refuse (`UserError`) ``runs`` that no listed model has finished, and pairs that can't be compared."""
    for weights in configuration.runs:
        if not any(configuration.has_run(model, run_of(weights)) for model in configuration.listed):
            _refuse(configuration, "runs", no_such_run(configuration, run_of(weights), *configuration.listed))
    _check_pairs(configuration)


def check_compared(configuration: Configuration) -> None:
    """Refuse (`UserError`) a comparison of nothing, and pairs that can't be compared."""
    if not configuration.compare:
        raise UserError("give the weights to compare: --config 'compare=[[9B/base, 9B/grpo]]'")
    _check_pairs(configuration)


def no_such_run(configuration: Configuration, run: str, *models: str) -> str:
    """What to say of a run that none of the models has finished."""
    known = {model: finished_runs(configuration.results, model) for model in models}
    has = "; ".join(f"{model} has {', '.join(names) or 'none'}" for model, names in known.items())
    command = f"snakemake train_{models[0]} --config run={run}"
    return f"no finished run {run!r} ({has}): correct the name, or make the run with `{command}`"


def _check_pairs(configuration: Configuration) -> None:
    for pair in configuration.compare:
        if fault := _incomparable(configuration, pair):
            _refuse(configuration, "compare", fault)


def _refuse(configuration: Configuration, key: str, fault: str) -> None:
    raise UserError(f"{configuration.origins[key]}: {key}: {fault}")


def _incomparable(configuration: Configuration, pair: tuple[tuple[str, str], tuple[str, str]]) -> str | None:
    """Why a pair of (model, weights) can't be compared, or None."""
    for model, weights in pair:
        if weights != BASE and not configuration.has_run(model, run_of(weights)):
            return no_such_run(configuration, run_of(weights), model)
    models = [model for model, _ in pair]
    names = " and ".join("/".join(weights) for weights in pair)
    if not (sets := configuration.shared_sets(*models)):
        return f"{names} are scored on no common problem set: give both one in evaluation.datasets"
    for dataset in sets:
        protocols = [
            scoring.shared(
                {
                    "evaluation": configuration.models[model].evaluation.model_dump(mode="json"),
                    "reward": configuration.reward(model, dataset).model_dump(mode="json"),
                }
            )
            for model in models
        ]
        if differing := list(staleness.settings(*protocols)):
            return f"{names} can't be compared on {dataset}: {'; '.join(differing)}: give both the same settings"
    return None
