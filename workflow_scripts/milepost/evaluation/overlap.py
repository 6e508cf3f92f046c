"""Find prompts that are in both a training set and a scored set: scores on them say little about new problems."""

import itertools
import unicodedata
from collections.abc import Sequence

from milepost.checkpoints.manifest import Manifest
from milepost.configuration.schema import Dataset
from milepost.problems.loading import Problem, read_problems

FEWEST_CHARACTERS = 30  # shorter questions are not compared without their set's common text
LINES = 5  # the most lines to list


def overlap(training: Manifest, scored: Manifest) -> str | None:
    """A sentence on how many prompts of ``scored`` are also in ``training``, and in which lines; None for none.

    Prompts are compared by the user's last message, ignoring spacing, case and compatibility characters, both whole and
    without the text that all prompts of a set start or end with, such as an instruction.
    """
    trained = _keys(training)
    first = {key: number for number, (_, keys) in reversed([*enumerate(trained)]) for key in keys}
    problems = _keys(scored)
    found = [(problem.place, [first[key] for key in keys & first.keys()]) for problem, keys in problems]
    shared = [f"{place} is {trained[min(there)][0].place}" for place, there in found if there]
    if not shared:
        return None
    named = ", ".join([*shared[:LINES], *(["..."] if len(shared) > LINES else [])])
    return (
        f"{len(shared)} of the {len(problems)} prompts of {scored.path.stem} are in the training set"
        f" {training.path.stem} as well ({named}): scores on them say little about new problems"
    )


def _keys(data: Manifest) -> list[tuple[Problem, set[str]]]:
    """The problems of a data set, and what each question is recognised by."""
    settings = Dataset.model_validate(data.provenance["config"]["dataset"])
    problems = read_problems(data.root, sorted(data.files), settings, "any").problems
    questions = [_words(problem.messages[-1]["content"]) for problem in problems]
    bare = _without_template(questions) if len(problems) > 1 else questions
    return [
        (problem, {" ".join(words)} | ({key} if len(key := " ".join(rest)) >= FEWEST_CHARACTERS else set()))
        for problem, words, rest in zip(problems, questions, bare, strict=True)
    ]


def _words(text: str) -> list[str]:
    return unicodedata.normalize("NFKC", text).casefold().split()


def _without_template(questions: Sequence[list[str]]) -> list[list[str]]:
    """Strip the words that all texts start and end with."""
    begin = _shared_words(questions)
    end = _shared_words([words[begin:][::-1] for words in questions])
    return [words[begin : len(words) - end] for words in questions]


def _shared_words(questions: Sequence[list[str]]) -> int:
    """How many leading words all texts share."""
    places = zip(*questions, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda words: len(set(words)) == 1, places))
