# What a person reads: tables, plots and one self-contained page.


def all_scores(wildcards):
    return [path for model in settings.listed for path in scores(model)]


def all_trainings(wildcards):
    return [
        f"{RESULTS}/{model}/grpo/{settings.run}/train.json" for model in settings.listed
    ]


def scores(model, weights=("base", settings.run)):
    """The score files of a model, on every problem set that it is evaluated on."""
    return expand(
        f"{RESULTS}/{model}/eval/{{dataset}}/{{weights}}.json",
        dataset=settings.models[model].evaluation.datasets,
        weights=weights,
    )
