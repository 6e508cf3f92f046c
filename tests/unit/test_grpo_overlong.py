"""Answers near the cap: what they lose, or that they leave the loss; the rewards that are logged stay as graded."""

import math

import pytest
import torch

from milepost.grpo.data import Prompt
from milepost.grpo.learner import Learner
from milepost.grpo.overlong import penalties, statistics
from milepost.grpo.samples import Sample, TrainingSequence, to_training
from milepost.rewards.base import Verdict
from milepost.rollout.engine import Completion
from settings import training_settings

CAP, BUFFER = 20, 8


def settings(mode="none", **overlong):
    return training_settings(
        training={"prompts_per_rollout": 2, "samples_per_prompt": 2, "global_batch": 4},
        sampling={"max_response_tokens": CAP},
        algorithm={"advantage": "dr_grpo", "overlong": {"mode": mode, **overlong}},
    )


def sample(reward, tokens):
    finish = "length" if tokens == CAP else "stop"
    completion = Completion([9] * tokens, [-0.5] * tokens, finish)
    return Sample(Prompt("mine", "line 1", [5, 6], "4"), completion, "text", Verdict(reward, None, "fixed"))


ROLLOUT = [sample(1.0, 10), sample(1.0, 16), sample(0.0, CAP), sample(1.0, 12)]


def counted(of):
    return statistics([s.completion for s in ROLLOUT], [s.reward for s in ROLLOUT], of)


def test_the_penalty_is_the_paper_s():
    """DAPO, arXiv 2503.14476, eq. 13: 0 up to the buffer, then linear down to -1 at the cap."""
    lengths = [1, CAP - BUFFER, CAP - BUFFER + 1, CAP - 2, CAP]
    expected = [0.5 * min(0.0, ((CAP - BUFFER) - length) / BUFFER) for length in lengths]
    found = penalties(torch.tensor(lengths), settings("penalty", buffer=BUFFER, penalty=0.5))
    assert found.tolist() == pytest.approx(expected) and expected[-1] == -0.5


def test_the_penalty_teaches_to_be_brief_where_all_answers_are_right():
    plain, brief = (
        to_training(ROLLOUT, settings(*mode, **more)) for mode, more in (((), {}), (("penalty",), {"buffer": BUFFER}))
    )
    assert [s.advantage for s in plain] == [0.0, 0.0, -0.5, 0.5]
    assert [s.advantage for s in brief] == pytest.approx([0.25, -0.25, -1.0, 1.0])  # 16 tokens cost half, 20 all
    assert ROLLOUT[1].reward == 1.0
    assert not any(s.is_filtered for s in brief)


def test_a_filtered_answer_stays_in_the_baseline_and_leaves_the_loss():
    sequences = to_training(ROLLOUT, settings("filter"))
    assert [s.advantage for s in sequences] == [0.0, 0.0, -0.5, 0.5]
    assert [s.is_filtered for s in sequences] == [False, False, True, False]


class Everything:
    """A policy that only notes what it is given."""

    learns_without_advantage = measures_every_response = True

    def micro_batches(self, sequences, totals):
        self.sequences, self.totals = sequences, totals
        return ["a pack"]


def test_a_filtered_answer_leaves_numerator_and_denominator():
    of = settings("filter")
    sequences, policy = to_training(ROLLOUT, of), Everything()
    Learner(policy, None, of)._prepare(sequences)
    assert policy.sequences == [sequences[0], sequences[1], sequences[3]]
    assert (policy.totals.responses, policy.totals.tokens) == (3, 10 + 16 + 12)


def test_a_step_of_filtered_answers_alone_is_skipped():
    cut_off = [TrainingSequence(s.ids, s.log_probs, 0.7, is_filtered=True) for s in to_training(ROLLOUT, settings())]
    step = Learner(Everything(), None, settings("filter"))._prepare(cut_off)
    assert not step.batches and not step.learns


def test_the_metrics_say_how_many_answers_were_touched_and_the_score_without_it():
    assert counted(settings()) == {}
    assert counted(settings("filter")) == {"overlong_share": 0.25, "reward_mean_without_overlong": 1.0}
    assert counted(settings("penalty", buffer=BUFFER)) == pytest.approx(
        {
            "overlong_share": 0.5,
            "reward_mean_without_overlong": 1.0,
            "reward_mean_with_penalty": (1 + (1 - 0.5) + (0 - 1) + 1) / 4,
        }
    )
    everything = counted(settings("penalty", buffer=CAP))
    assert everything["overlong_share"] == 1 and math.isnan(everything["reward_mean_without_overlong"])
