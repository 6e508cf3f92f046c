"""A user's function grades; its errors, up to a share, affect neither the run nor other samples."""

import os
import time

import psutil
import pytest

from answered import response
from milepost.common.errors import UserError
from milepost.configuration.early import check_function
from milepost.configuration.rewards import Function, Reward
from milepost.rewards.grader import Grader
from milepost.rewards.processes import Pool
from milepost.rewards.user import UserReward

REWARDS = """
import os, sys, time
from helper import LIMIT

def brief(sample):
    print("not an answer to the parent")
    return float(len(sample.answer) <= LIMIT), f"{len(sample.answer)} characters"

def seen(sample):
    given = [sample.row["topic"], sample.prompt[-1]["content"], sample.label, sample.reasoning, sample.answer]
    return 0.5, "|".join([*given, sample.finish, str(sample.tokens)])

def misbehave(sample):
    what = sample.answer
    if what == "raise":
        raise KeyError("no such thing")
    if what == "exit":
        sys.exit("enough")
    if what == "die":
        os.abort()
    if what == "hang":
        time.sleep(600)
    if what == "hoard":
        bytearray(3 * 2**30)
    return eval(what)

def together(samples):
    return [1 / len(samples)] * len(samples)

def too_few(samples):
    return [1.0] * (len(samples) - 1)

def busy(sample):
    with open("pids", "a") as file:
        print(os.getpid(), file=file)
    time.sleep(0.3)
    return 1

def once(sample):
    if os.path.exists(sample.answer):
        return 1
    open(sample.answer, "w").close()
    raise ConnectionError("try again")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "helper.py").write_text("LIMIT = 3\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grade(name, answers, **settings):
    with Grader(Reward(function=f"my_rewards.py:{name}", think_block="optional", **settings)) as grader:
        verdicts = grader.grade([response(text, think_block="optional") for text in answers])
        grader.settle()
        return verdicts


def test_a_function_returns_a_reward_and_its_reason_and_may_print(folder):
    verdicts = grade("brief", ["yes", "yes indeed"])
    assert [(verdict.reward, verdict.reason) for verdict in verdicts] == [(1, "3 characters"), (0, "10 characters")]
    assert [verdict.correct for verdict in verdicts] == [True, False]


def test_a_function_sees_the_whole_sample(folder):
    sample = response("I think.</think>Yes. \ud83d", "the label", topic="birds")
    with Grader(Reward(function="my_rewards.py:seen")) as grader:
        [verdict] = grader.grade([sample])
    assert verdict.reason.encode("utf-8", "replace").decode() == "birds|?|the label|I think.|Yes. ?|stop|22"


@pytest.mark.parametrize(
    ("answer", "reason", "told"),
    [
        ("raise", "grading_error", "KeyError: 'no such thing' (my_rewards.py, line 16)"),
        ("exit", "grading_error", "SystemExit: enough"),
        ("die", "grading_error", "its process ended with status -6"),
        ("hang", "grading_timeout", "a call took more than reward.max_seconds 2"),
        ("hoard", "grading_error", "MemoryError"),
        ("float('nan')", "grading_error", "a finite number is expected, not nan"),
        ("float('-inf')", "grading_error", "a finite number is expected, not -inf"),
        ("10**400", "grading_error", "a finite number is expected, not 1000"),
        ("'1.0'", "grading_error", "is expected, not '1.0'"),
        ("None", "grading_error", "is expected, not None"),
        ("(1.0, 2.0)", "grading_error", "is expected, not (1.0, 2.0)"),
        ("1j", "grading_error", "is expected, not 1j"),
    ],
)
def test_a_function_s_error_affects_only_its_own_sample_and_is_shown_once(folder, caplog, answer, reason, told):
    answers = ["0.25", answer, "True", answer]
    verdicts = grade("misbehave", answers, on_error=-1.0, max_error_share=0.5, max_seconds=2, memory_gib=2, processes=2)
    assert [verdict.reward for verdict in verdicts] == [0.25, -1, 1, -1]
    assert [verdict.reason for verdict in verdicts] == ["", reason, "", reason]
    [record] = caplog.records
    assert told in record.message and f"the response ends {answer!r}" in record.message


def test_more_failures_than_their_share_end_the_run_in_one_line(folder):
    answers = ["raise", *["1"] * 7]
    assert sum(verdict.failed for verdict in grade("misbehave", answers, max_error_share=0.125)) == 1
    with pytest.raises(UserError, match=r"failed on 2 of 8 samples, more than .*max_error_share 0\.125.*KeyError"):
        grade("misbehave", ["raise", *answers[:-1]], max_error_share=0.125)


def test_a_worker_that_hung_is_replaced_and_none_outlives_the_grader(folder):
    started = time.monotonic()
    with Grader(Reward(function="my_rewards.py:misbehave", max_seconds=1, processes=1)) as grader:
        [first] = grader.grade([response("</think>1")])
        [worker] = grader.parts[0][1].pool.workers
        before = worker.process.pid
        assert os.getsid(before) != os.getsid(0)  # Ctrl-C at the terminal does not reach it
        [hung] = grader.grade([response("</think>hang")])
        assert hung.failed
        [last] = grader.grade([response("</think>2")])
        assert (first.reward, last.reward) == (1, 2) and worker.process.pid != before
        after = worker.process.pid
    assert not psutil.pid_exists(before) and not psutil.pid_exists(after)
    assert time.monotonic() - started < 120  # a guard: the function sleeps for 600 s


def test_several_workers_share_the_samples(folder):
    grade("busy", ["x"] * 8, processes=4)
    assert len(set((folder / "pids").read_text().split())) == 4


def test_a_batch_is_handed_over_as_a_list(folder):
    assert [verdict.reward for verdict in grade("together", ["a", "b", "c", "d"], batch=True)] == [0.25] * 4
    with pytest.raises(UserError, match="a list of 4 rewards is expected, not 3 values"):
        grade("too_few", ["a", "b", "c", "d"], batch=True)


def test_a_failed_call_is_tried_again(folder):
    with pytest.raises(UserError, match="ConnectionError: try again"):
        grade("once", ["flag-1"])
    [verdict] = grade("once", ["flag-2"], retries=1)
    assert verdict.reward == 1


def test_a_file_that_cannot_be_imported_ends_the_run_at_once(folder):
    (folder / "helper.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match=r"my_rewards\.py can't be loaded: ModuleNotFoundError: .*no_such_package"):
        grade("brief", ["x"])


def test_a_sum_weighs_its_parts_and_keeps_each_ones_verdict(folder):
    parts = [{"kind": "exact"}, {"function": "my_rewards.py:brief", "weight": 0.5, "name": "short"}]
    with Grader(Reward(sum=parts, correct_from=1.5)) as grader:
        verdicts = grader.grade([response(f"</think>{text}", "yes") for text in ("yes", "no", "certainly")])
    assert [verdict.reward for verdict in verdicts] == [1.5, 0.5, 0]
    assert [verdict.correct for verdict in verdicts] == [True, False, False]
    assert verdicts[0].reason == "correct" and verdicts[0].answer == "yes"
    assert verdicts[2].parts_as_json() == {
        "exact": {"reward": 0, "reason": "wrong"},
        "short": {"reward": 0, "reason": "9 characters"},
    }


def test_a_failing_part_gives_the_whole_sample_its_reward_on_error(folder):
    parts = [{"kind": "exact", "weight": 5.0}, {"function": "my_rewards.py:misbehave"}]
    with Grader(Reward(sum=parts, on_error=-2.0, max_error_share=0.5)) as grader:
        verdicts = grader.grade([response(f"</think>{text}", text) for text in ("raise", "1")])
    assert [(verdict.reward, verdict.reason) for verdict in verdicts] == [(-2, "grading_error"), (6, "correct")]


def test_a_signal_that_ends_grading_leaves_no_answer_behind_for_the_next(folder):
    """As when a training is asked to end: an answer to the last question must not be taken for the next one's."""
    reward = UserReward(Function("my_rewards.py", "misbehave"), False, Reward(function="my_rewards.py:misbehave"))

    class Asked(Exception):
        pass

    def interrupted(worker, question):
        worker.start()
        worker.process.stdin.write(b'{"samples": [], "max_seconds": 5}\n')
        raise Asked

    try:
        assert isinstance(reward.pool, Pool)
        with pytest.raises(Asked):
            reward.pool.ask(interrupted, [1])
        [verdict] = reward.grade([response("</think>7")])
        assert verdict.reward == 7
    finally:
        reward.close()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"no such file: correct reward.function"),
        ("def brief(sample):\n    return 1 +\n", r"my_rewards.py, line 2: invalid syntax"),
        ("def breif(sample): return 1\n", r"has no function 'brief', did you mean 'breif'\?"),
        ("class Judge:\n    def brief(self, sample): return 1\n", r"has no function 'brief'"),
        ("async def brief(sample): return 1\n", "a plain function"),
        ("x = brief(1)\n", "has no function 'brief'"),
    ],
)
def test_a_mistake_that_the_file_shows_is_told_without_running_it(folder, content, told):
    file = folder / "my_rewards.py"
    file.write_text(content or "")
    if content is None:
        file.unlink()
    with pytest.raises(UserError, match=told):
        check_function(Function("my_rewards.py", "brief"))


@pytest.mark.parametrize(
    "content",
    [
        "def brief(sample): return 1",
        "from helper import brief",
        "from helper import *",
        "brief = lambda sample: 1",
        "try:\n    from fast import brief\nexcept ImportError:\n    def brief(sample): return 1",
    ],
)
def test_a_function_may_be_made_in_any_way_at_the_top_of_its_file(folder, content):
    (folder / "my_rewards.py").write_text(content)
    check_function(Function("my_rewards.py", "brief"))
    assert os.listdir(folder)  # nothing was run, and nothing written
    assert not (folder / "__pycache__").exists()
