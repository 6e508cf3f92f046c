"""Interrupts, and sections that must complete."""

import os
import signal

import pytest

from milepost.common.interrupts import Interrupted, Interrupts


def ask_to_end():
    os.kill(os.getpid(), signal.SIGTERM)


def test_abandonable_work_is_left_at_once_and_other_work_is_not():
    done = []
    with Interrupts() as interrupts:
        ask_to_end()
        done.append("other work")
        assert interrupts.requested and interrupts.exit_status == 128 + signal.SIGTERM
        with pytest.raises(Interrupted), interrupts.abandonable():
            done.append("abandonable work")
    assert done == ["other work"]


def test_a_held_part_of_abandonable_work_comes_to_its_end_first():
    done = []
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted), interrupts.abandonable():
            with interrupts.held():
                ask_to_end()
                done.append("held")
            done.append("abandonable")
        with interrupts.held():  # outside of abandonable work it changes nothing
            done.append("held outside")
    assert done == ["held", "held outside"]
