"""The problems that a data set's manifest vouches for."""

from milepost.checkpoints.manifest import Manifest
from milepost.common.problems import Problem, load_problem_set
from milepost.configuration.schema import Dataset


def load_problems(data: Manifest, labels: str = "math") -> list[Problem]:
    """All rows of an evaluation set, their labels read as ``labels`` says (`common.labels.READERS`).

    An unusable row is a `UserError` whatever share of them training would bear: a score over fewer problems is another
    score. So are another number of rows than the configuration names, and, where it says so, a repeated prompt.
    """
    data.require(digests=True)
    file = data.root / data.facts["file"]
    settings = Dataset.model_validate(data.provenance["config"]["dataset"])
    problems, _ = load_problem_set(file, settings, labels, max_bad_share=0.0)
    return problems
