"""The time that a run has left, against sums worked out by hand."""

import pytest

from milepost.common.durations import duration
from milepost.grpo.pace import Pace


def pace(*rows, rollouts=100, validation_interval=20, save_interval=10):
    found = Pace(rollouts, validation_interval, save_interval)
    for row in rows:
        found.add(row)
    return found


STEPS = [{"rollout": n, "seconds_step": 60.0} for n in range(1, 11)]
VALIDATION = {"validation_average": 0.5, "seconds_validation": 300.0}


def test_what_is_left_counts_steps_validations_and_checkpoints():
    saved = [{"rollout": 11, "seconds_step": 60.0, "seconds_save": 30.0}]
    rows = [{"rollout": 0} | VALIDATION, *STEPS, *saved]
    # 89 steps; validations after 20, 40 ... 100; checkpoints after 20, 30 ... 100
    assert pace(*rows).seconds_left() == 89 * 60 + 5 * 300 + 9 * 30
    assert pace(*rows, validation_interval=0).seconds_left() == 89 * 60 + 9 * 30
    assert pace(*rows, rollouts=15).seconds_left() == 4 * 60 + 30  # the last one is saved out of turn


def test_a_validation_that_is_due_now_counts_until_it_is_done():
    rows = [{"rollout": 0} | VALIDATION, *STEPS, *({"rollout": n, "seconds_step": 60.0} for n in range(11, 21))]
    assert pace(*rows).seconds_left() == 80 * 60 + 5 * 300
    assert pace(*rows, {"rollout": 20} | VALIDATION).seconds_left() == 80 * 60 + 4 * 300


def test_one_slow_step_does_not_count_and_lasting_change_does():
    slow = {"rollout": 11, "seconds_step": 3600.0}
    assert pace(*STEPS, slow, rollouts=12, validation_interval=0).seconds_left() == 60
    grown = [{"rollout": n, "seconds_step": 90.0} for n in range(11, 31)]
    assert pace(*STEPS, *grown, rollouts=31, validation_interval=0).seconds_left() == 90


def test_nothing_is_estimated_before_the_first_step():
    assert pace({"rollout": 0} | VALIDATION).seconds_left() is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "< 0.01 s"),
        (0.0123, "0.012 s"),
        (7.61, "7.6 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (250, "4 min 10 s"),
        (3599.7, "1 h"),
        (12_000, "3 h 20 min"),
        (86_399, "1 d"),
        (183_600, "2 d 3 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds, said):
    assert duration(seconds) == said
