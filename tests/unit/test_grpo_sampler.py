"""Groups that are replaced or carried over: nothing is lost, learned twice, too old, or out of order."""

import functools
import itertools
import math
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from milepost.common.errors import UserError
from milepost.common.interrupts import Interrupted, Interrupts
from milepost.grpo.data import Prompt, PromptCursor
from milepost.grpo.groups import read_groups, save_groups
from milepost.grpo.sampler import Sampler
from milepost.rewards.base import Verdict
from milepost.rollout.engine import NOT_BEGUN, PAUSE, Completion, request_seed
from milepost.rollout.prompts import load_tokenizer
from milepost.tiny.tokenizer import train_tokenizer, write_tokenizer
from settings import training_settings

PROMPTS = [Prompt("sums", f"line {line}", [5, line], "4", row={"line": line}) for line in range(1, 8)]
LONGEST = 30


class ScriptedEngine:
    """A seed decides a response's tokens and length; ``slots`` run at once. A token's log-prob is its seed."""

    def __init__(self, slots: int) -> None:
        self.slots, self.calls, self.steps, self.interrupt_at = slots, [], 0, math.inf

    def generate(self, requests, params, on_done=None):
        requests, running, found, paused = list(requests), {}, {}, False
        self.calls.append(requests)
        while not paused and len(found) < len(requests):
            waiting = (index for index in range(len(requests)) if index not in found and index not in running)
            running |= {index: [] for index in itertools.islice(waiting, self.slots - len(running))}
            for index in list(running):
                request = requests[index]
                running[index].append(token(request.seed, len(request.prefix_ids) + len(running[index])))
                if len(request.prefix_ids) + len(running[index]) == length(request.seed):
                    found[index] = completion(request, running.pop(index), "stop")
                    reply = on_done(index, found[index])
                    paused |= reply == PAUSE
                    requests += () if reply in (PAUSE, None) else reply
            self.steps += 1
            if self.steps == self.interrupt_at:
                raise Interrupted
        found |= {index: completion(requests[index], tokens, "paused") for index, tokens in running.items()}
        return [found.get(index, NOT_BEGUN) for index in range(len(requests))]

    def sleep(self):
        pass


def token(seed, position):
    return 40 + (seed + 7 * position) % 50


def length(seed):
    return 1 + seed % LONGEST


def completion(request, tokens, finish):
    return Completion(tokens, [-float(request.seed)] * len(tokens), finish)


class ByLength:
    """Right where a response is long; to prompts that are ``flat`` all responses are wrong."""

    def __init__(self, flat):
        self.flat, self.settings = flat, training_settings().reward

    def grade(self, responses):
        rewards = [response.tokens > LONGEST / 2 and response.row["line"] not in self.flat for response in responses]
        return [Verdict(float(reward), None, "by length") for reward in rewards]

    def settle(self):
        pass


def sampler(slots=8, flat=(), training=(), waiting=(), **sampling):
    settings = training_settings(
        training={"prompts_per_rollout": 3, "samples_per_prompt": 4, "global_batch": 12, **dict(training)},
        sampling=sampling,
    )
    cursor = PromptCursor({"sums": PROMPTS}, settings.training.seed)
    graders = {"sums": ByLength(flat)}
    return Sampler(settings, ScriptedEngine(slots), tokenizer(), (), graders, cursor, Interrupts(), tuple(waiting))


@functools.cache
def tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(train_tokenizer(), Path(folder))
        return load_tokenizer(Path(folder))


def seeds(samples):
    return [-int(sample.completion.log_probs[0]) for sample in samples]


def assert_whole(sample):
    (seed,) = {-int(log_prob) for log_prob in sample.completion.log_probs}
    assert sample.completion.token_ids == [token(seed, position) for position in range(length(seed))]
    assert sample.completion.finish == "stop"


def test_by_default_a_rollout_asks_for_all_its_samples_at_once_and_waits_for_each():
    one = sampler()
    rollout = one.draw(3)
    ((asked),) = one.engine.calls
    assert [request.seed for request in asked] == [
        request_seed(1234, 3, place, number) for place in range(3) for number in range(4)
    ]
    assert seeds(rollout.samples) == [request.seed for request in asked]
    for sample in rollout.samples:
        assert_whole(sample)
    assert rollout.generated == rollout.samples and not rollout.flow and not one.waiting


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("over_sampling", "max_age"), [(1.5, 2), (2.0, 1), (2.7, 2), (3.0, 4)])
def test_every_response_is_learned_from_once_whole_and_in_time(over_sampling, max_age, dynamic):
    one = sampler(over_sampling=over_sampling, max_age=max_age, training={"dynamic_sampling": dynamic}, flat=(2, 5))
    learned, replaced, ages = Counter(), Counter(), []
    for number in range(1, 41):
        rollout = one.draw(number)
        assert len(rollout.samples) == 12
        for sample in rollout.samples:
            assert_whole(sample)
        for start in range(0, 12, 4):
            assert len({sample.prompt.place for sample in rollout.samples[start : start + 4]}) == 1
        learned.update(seeds(rollout.samples))
        if dynamic:
            replaced.update(seeds(rollout.generated))
            assert {sample.prompt.place for sample in rollout.samples}.isdisjoint(("line 2", "line 5"))
        assert rollout.flow["token_age_max"] <= max_age
        assert all(number - group.birth <= max_age for group in one.waiting)
        ages.append(rollout.flow["token_age_mean"])
    waiting = {answer.seed for group in one.waiting for answer in group.answers}
    begun = {request.seed for call in one.engine.calls for request in call}
    assert set(learned.values()) == {1}
    assert not learned.keys() & waiting
    assert begun <= learned.keys() | replaced.keys() | waiting, "a response was dropped"
    assert max(ages) > 0, "nothing was carried over"


def test_over_sampling_does_not_prefer_short_responses():
    """What is learned from is as long as what was begun; dropping the unfinished ones would leave the short ones."""
    one = sampler(over_sampling=2.0)
    samples = [sample for number in range(1, 301) for sample in one.draw(number).samples]
    lengths = [len(sample.completion.token_ids) for sample in samples]
    error = LONGEST / math.sqrt(12) / math.sqrt(len(lengths))
    assert abs(sum(lengths) / len(lengths) - (LONGEST + 1) / 2) < 4 * error


def test_over_sampling_saves_the_wait_for_the_longest_response():
    steps = []
    for over_sampling in (1.0, 2.0):
        one = sampler(slots=12, over_sampling=over_sampling)
        for number in range(1, 41):
            one.draw(number)
        steps.append(one.engine.steps)
    assert steps[1] < 0.75 * steps[0]


def test_prompts_are_taken_in_the_epoch_s_order_whatever_is_replaced():
    one = sampler(training={"dynamic_sampling": True}, flat=(2, 5), over_sampling=1.5)
    for number in range(1, 8):
        one.draw(number)
    begun = list(dict.fromkeys((request.seed, *request.prompt_ids) for call in one.engine.calls for request in call))
    lines = [line for _, _, line in begun[::4]]
    order = PromptCursor({"sums": PROMPTS}, 1234).take(len(lines))
    # A request that is added in the middle of a rollout is appended to its call, so the calls show the order.
    assert lines == [prompt.ids[-1] for prompt in order]


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_where_all_groups_are_flat_a_rollout_ends_within_the_factor(factor):
    one = sampler(training={"dynamic_sampling": True, "max_prompts_factor": factor}, flat=range(1, 8))
    rollout = one.draw(1)
    assert len(rollout.samples) == 12 and rollout.flow["prompts_begun"] == int(3 * factor)
    assert rollout.flow["replaced_groups"] == int(3 * factor) - 3
    assert len(rollout.generated) == 4 * int(3 * factor), "the metrics are over all that was generated"
    assert not any(sequence.advantage for sequence in rollout.sequences)


def test_an_interrupted_rollout_leaves_what_was_carried_as_it_was():
    one = sampler(over_sampling=2.0)
    one.draw(1)
    before, cursor = one.waiting, one.cursor.state()
    one.engine.interrupt_at = one.engine.steps + 3
    assert one.draw(2) is None
    assert one.waiting == before
    again = sampler(over_sampling=2.0, waiting=before)
    again.cursor.restore(cursor)
    straight = sampler(over_sampling=2.0)
    straight.draw(1)
    assert again.draw(2).samples == straight.draw(2).samples


def test_saved_groups_come_back_as_they_were(tmp_path):
    one = sampler(over_sampling=2.7, training={"dynamic_sampling": True})
    for number in itertools.count(1):
        one.draw(number)
        if {group.graded for group in one.waiting} == {True, False}:
            break
    save_groups(tmp_path / "groups.safetensors", one.waiting)
    found = read_groups(tmp_path / "groups.safetensors", {"sums": PROMPTS})
    assert [unrounded(group) for group in found] == [unrounded(group) for group in one.waiting]
    gone = one.waiting[0].prompt.place
    with pytest.raises(UserError, match=f"answers to {gone} of sums.* put the data back"):
        read_groups(tmp_path / "groups.safetensors", {"sums": [p for p in PROMPTS if p.place != gone]})


def unrounded(group):
    """A group without its log-probs, which are seeds here and too large for fp32."""
    return [(group.prompt, group.birth)] + [
        (
            answer.seed,
            answer.completion.token_ids,
            answer.completion.finish,
            answer.versions,
            answer.text,
            answer.verdict,
        )
        for answer in group.answers
    ]
