"""Multiple choice and exact text: only a single matching answer earns the reward."""

import time

import pytest

from answered import graded
from milepost.common.errors import UserError
from milepost.common.labels import READERS
from milepost.configuration.schema import Dataset, Reward
from milepost.problems.loading import load_problem_set, read_problems
from milepost.rewards.grader import Grader


def judged(text, label, **settings):
    with Grader(Reward(**settings)) as grader:
        [verdict] = graded(grader, [(text, label)])
    return verdict


@pytest.mark.parametrize(
    "said",
    [
        r"\boxed{B}",
        r"\boxed{b}",
        r"\boxed{(B)}",
        r"\boxed{\text{B}}",
        r"\boxed{\textbf{(B)}}",
        "Answer: B",
        "So the final answer: (b).",
        "**Answer:** B",
        "**Answer: B**",
        "Answer:\nB",
        r"Answer: $\boxed{B}$",
        "Answer: A\nNo, wait.\nAnswer: B",
        r"\boxed{A}, or rather \boxed{B}",
        "Answer: B\n\\boxed{B}",
        "Answer: B",
    ],
)
def test_a_letter_that_is_chosen_earns_the_reward(said):
    verdict = judged(f"Let me think.</think>{said}", "B", kind="choice")
    assert (verdict.reward, verdict.answer, verdict.reason) == (1, "B", "correct")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("</think>Answer: C", "wrong"),
        ("</think>Answer: A or B", "no_letter"),
        ("</think>Answer: AB", "no_letter"),
        ("</think>Answer: B, C", "no_letter"),
        ("</think>Answer: a bird", "no_letter"),
        (r"</think>\boxed{A, B}", "no_letter"),
        (r"</think>\boxed{B}\boxed{A, B, C, D}", "no_letter"),
        ("</think>Answer: A\n\\boxed{B}", "several_answers"),
        ("</think>B", "no_choice"),
        ("</think>Answers: B", "no_choice"),
        ("</think>Answer:", "no_choice"),
        ("</think>Answer: \u0412", "no_letter"),  # Cyrillic
        (r"</think>\boxed{}", "no_choice"),
        ("Answer: B", "no_think_end"),
        ("<think>Answer: B</think>", "no_choice"),
        ("", "no_think_end"),
    ],
)
def test_what_chooses_no_single_letter_earns_nothing(said, reason):
    verdict = judged(said, "B", kind="choice")
    assert (verdict.reward, verdict.reason) == (0, reason)


@pytest.mark.parametrize(
    "piece", ["Answer:", "Answer: B ", r"\boxed{", r"\boxed{B}", "(" * 9, "answer*", "\n", "Answer:\n"]
)
@pytest.mark.parametrize("kind", ["choice", "exact"])
def test_a_hostile_response_takes_no_longer_than_its_length(kind, piece):
    started = time.monotonic()
    judged("</think>" + piece * 100_000, "B", kind=kind)
    assert time.monotonic() - started < 30  # a guard: quadratic time takes hours


def test_exact_text_is_compared_as_the_settings_say():
    cases = [("Straße", "STRASSE"), (" yes\n", "yes"), ("yes", "yes"), ("yes.", "yes"), ("y e s", "yes"), ("", "yes")]
    found = {
        (trim, fold): [
            judged(f"</think>{said}", label, kind="exact", trim=trim, fold_case=fold).correct for said, label in cases
        ]
        for trim in (True, False)
        for fold in (True, False)
    }
    assert found == {
        (True, True): [True, True, True, False, False, False],
        (True, False): [False, True, True, False, False, False],
        (False, True): [True, False, True, False, False, False],
        (False, False): [False, False, True, False, False, False],
    }
    assert judged("yes", "yes", kind="exact").reason == "no_think_end"
    assert judged("yes", "yes", kind="exact", think_block="optional").correct


@pytest.mark.parametrize(
    ("labels", "value", "label"),
    [
        ("choice", "(c)", "C"),
        ("exact", "We add them. So it is 2.", "We add them. So it is 2."),
        ("exact", 8.0, "8"),
        ("any", "We add them. So it is 2.", "We add them. So it is 2."),
        ("any", ["a", "b"], '["a", "b"]'),
        ("any", None, None),
    ],
)
def test_a_label_is_read_as_its_reward_needs_it(labels, value, label):
    assert READERS[labels].read(value) == label


@pytest.mark.parametrize(("labels", "value"), [("choice", "AB"), ("choice", 1), ("exact", " "), ("exact", ["a", "b"])])
def test_a_label_that_no_response_could_match_is_refused(labels, value):
    with pytest.raises(ValueError, match=r"^is "):
        READERS[labels].read(value)


ROWS = '{"prompt": [{"role": "user", "content": "Sing."}], "mood": "sad"}\n' * 2


def test_a_function_needs_no_label_and_gets_the_whole_row(tmp_path):
    known = Dataset(folder="x", file="rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(ROWS)
    found = read_problems(tmp_path, ["rows.jsonl"], known, "any")
    assert [(problem.label, problem.row["mood"]) for problem in found.problems] == [(None, "sad")] * 2 and not found.bad
    with pytest.raises(UserError, match=r"2 of 2 rows are unusable: no 'label' .*: the rows have prompt, mood: "):
        load_problem_set(tmp_path, ["rows.jsonl"], known, "exact")


def test_an_instruction_ends_every_prompt_of_a_reward_that_reads_no_boxes(tmp_path):
    known = Dataset(folder="x", file="rows.jsonl", instruction="In rhyme.")
    (tmp_path / "rows.jsonl").write_text(ROWS.replace("Sing.", "Sing of \\\\boxed things."))
    problems = load_problem_set(tmp_path, ["rows.jsonl"], known, "any").problems
    assert problems[0].messages[-1]["content"] == "Sing of \\boxed things.\n\nIn rhyme."
