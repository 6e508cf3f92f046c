"""Load the problems of a data set from its manifest."""

from milepost.checkpoints.manifest import Manifest
from milepost.configuration.schema import Dataset
from milepost.problems.loading import Problem, load_problem_set


def load_problems(data: Manifest, labels: str = "math") -> list[Problem]:
    """All rows of an evaluation set, their labels read as ``labels`` says (`common.labels.READERS`).

    Any unusable row is a `UserError`, even if training would tolerate it, because a score over fewer problems is a
    different score. So are a number of rows other than the configured one and, if configured, repeated prompts.
    """
    data.require(digests=True)
    settings = Dataset.model_validate(data.provenance["config"]["dataset"])
    return load_problem_set(data.root, sorted(data.files), settings, labels, max_bad_share=0.0).problems
