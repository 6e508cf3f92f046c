"""A training's requests to its engine, and its metrics of the responses, both observed at the engine."""

import json
import resource
from itertools import batched

import pytest

import grpo_run
import train
from milepost.checkpoints.manifest import read_manifest
from milepost.rollout.engine import SamplingParams
from milepost.rollout.prompts import decode, load_tokenizer, stop_token_ids

SAMPLING = {"max_response_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "enable_thinking": False}
VALIDATION = {"interval": 1, "max_response_tokens": 5, "temperature": 0.5, "top_p": 0.8, "samples_per_problem": 2}
ROLLOUTS, PROMPTS, GROUP, PROBLEMS = 3, 3, 4, 2


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A training's calls of its engine as (params, requests, completions), its folder, and its tokenizer."""
    folder = grpo_run.prepare(tmp_path_factory.mktemp("requests"))
    grpo_run.convert_model(folder)
    calls, start = [], train.start_engine

    def watched(*arguments, **named):
        engine = start(*arguments, **named)
        generate = engine.generate

        def record(requests, params, *rest):
            completions = generate(requests, params, *rest)
            calls.append((params, list(requests), completions))
            return completions

        engine.generate = record
        return engine

    changes = {"sampling": SAMPLING, "validation": VALIDATION, "reward": {"think_block": "optional"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "start_engine", watched)
        grpo_run.run(grpo_run.arguments(folder, folder / "run", training={"rollouts": ROLLOUTS}, **changes))
    return calls, folder, load_tokenizer(folder / "hub")


@pytest.fixture(scope="module")
def rollouts(asked):
    return [call for call in asked[0] if len(call[1]) == PROMPTS * GROUP]


@pytest.fixture(scope="module")
def validations(asked):
    return [call for call in asked[0] if len(call[1]) == PROBLEMS * VALIDATION["samples_per_problem"]]


def metrics(asked, of):
    """The lines of the log that have the key ``of``."""
    lines = map(json.loads, (asked[1] / "run/metrics.jsonl").read_text().splitlines())
    return [line for line in lines if of in line]


def response(asked, completion):
    """A completion's text."""
    return decode(asked[2], completion.token_ids, stop_token_ids(asked[1] / "hub", asked[2]))


def earned(asked, completions):
    """The reward of each response by `FixedReward`."""
    return [sum(map(ord, response(asked, completion))) % 2 == 0 for completion in completions]


def test_rollouts_and_validations_are_sampled_as_their_settings_say(asked, rollouts, validations):
    stops = stop_token_ids(asked[1] / "hub", asked[2])
    assert [len(requests) for _, requests, _ in asked[0]] == [4, 12, 4, 12, 4, 12, 4]  # a validation first and last
    assert {params for params, *_ in rollouts} == {SamplingParams(8, 0.7, 0.9, 50, stop_token_ids=stops)}
    assert {params for params, *_ in validations} == {SamplingParams(5, 0.5, 0.8, stop_token_ids=stops)}


def test_every_prompt_closes_its_think_block_where_thinking_is_off(asked):
    for _, requests, _ in asked[0]:
        assert all(decode(asked[2], request.prompt_ids).endswith("</think>\n\n") for request in requests)


def test_a_group_shares_its_prompt_and_no_two_samples_their_seed(rollouts):
    for _, requests, _ in rollouts:
        groups = [[tuple(request.prompt_ids) for request in group] for group in batched(requests, GROUP)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == PROMPTS
    seeds = [request.seed for _, requests, _ in rollouts for request in requests]
    assert len(set(seeds)) == ROLLOUTS * PROMPTS * GROUP


def test_every_prompt_comes_once_an_epoch(rollouts):
    taken = [tuple(requests[start].prompt_ids) for _, requests, _ in rollouts for start in range(0, 12, GROUP)]
    assert len(set(taken[:7])) == 7  # rows of the data set


def test_a_validation_asks_the_same_each_time(validations):
    first, *others = ([(tuple(r.prompt_ids), r.seed) for r in requests] for _, requests, _ in validations)
    assert len(set(first)) == len(first) and all(other == first for other in others)


def test_the_metrics_of_a_rollout_are_those_of_its_answers(asked, rollouts):
    lines = metrics(asked, "reward_mean")
    assert [line["rollout"] for line in lines] == [1, 2, 3]
    for line, (_, requests, completions) in zip(lines, rollouts, strict=True):
        rewards = earned(asked, completions)
        groups = list(batched(rewards, GROUP))
        lengths = [len(completion.token_ids) for completion in completions]
        assert line["reward_mean"] == pytest.approx(sum(rewards) / 12)
        assert line["pass_rate"] == pytest.approx(sum(map(any, groups)) / PROMPTS)
        assert line["groups_without_spread"] == pytest.approx(sum(len(set(group)) == 1 for group in groups) / PROMPTS)
        assert line["response_length_mean"] == pytest.approx(sum(lengths) / 12)
        assert line["truncated_share"] == pytest.approx(sum(c.finish == "length" for c in completions) / 12)
        tokens = sum(lengths) + sum(len(request.prompt_ids) for request in requests)
        assert line["tokens_per_second"] * line["seconds_step"] == pytest.approx(tokens)
        parts = ("rollout", "train", "sync", "sleep_wake")
        assert line["seconds_step"] == pytest.approx(sum(line[f"seconds_{part}"] for part in parts))


def test_host_memory_is_this_process_s_peak_so_far_in_gib(asked):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    peaks = [line["host_memory_gib"] for line in metrics(asked, "reward_mean")]
    assert peak / 10 < peaks[0] <= peaks[-1] <= peak


def test_kept_samples_are_the_first_groups_of_their_rollout(asked, rollouts):
    rows = [json.loads(line) for line in (asked[1] / "run/samples.jsonl").read_text().splitlines()]
    for number, (_, requests, completions) in enumerate(rollouts, start=1):
        kept = [row for row in rows if row["rollout"] == number]
        expected = list(zip(requests, completions, earned(asked, completions), strict=True))[: 2 * GROUP]
        assert [(row["prompt"], row["response"], row["reward"], row["tokens"], row["finish"]) for row in kept] == [
            (decode(asked[2], r.prompt_ids), response(asked, c), float(right), len(c.token_ids), c.finish)
            for r, c, right in expected
        ]


def test_validation_scores_are_those_of_its_answers_and_the_best_saved_one_is_named(asked, validations):
    lines = metrics(asked, "validation_average")
    averages = [sum(earned(asked, completions)) / 4 for *_, completions in validations]
    assert [(line["rollout"], line["validation_average"]) for line in lines] == list(enumerate(averages))
    for line, (*_, completions) in zip(lines, validations, strict=True):
        assert line["validation_mean_tokens"] == pytest.approx(sum(len(c.token_ids) for c in completions) / 4)
        assert line["validation_truncated_share"] == sum(c.finish == "length" for c in completions) / 4
    saved = {2: averages[2], 3: averages[3]}  # every second, and the last
    best = max(saved, key=saved.get)
    assert read_manifest(asked[1] / "run.json").facts["best"] == {
        "checkpoint": f"checkpoint-{best:06d}",
        "score": saved[best],
    }
