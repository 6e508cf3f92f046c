"""Load the problems of a data set from its manifest."""

from milepost.checkpoints.manifest import Manifest
from milepost.common.problems import Problem, load_problem_set
from milepost.configuration.schema import Dataset


def load_problems(data: Manifest, labels: str = "math") -> list[Problem]:
    """All rows of an evaluation set, their labels read as ``labels`` says (`common.labels.READERS`).

    Any unusable row is a `UserError`, even if training would tolerate it, because a score over fewer problems is a
    different score. So are a number of rows other than the configured one and, if configured, repeated prompts.
    """
    data.require(digests=True)
    file = data.root / data.facts["file"]
    settings = Dataset.model_validate(data.provenance["config"]["dataset"])
    problems, _ = load_problem_set(file, settings, labels, max_bad_share=0.0)
    return problems
