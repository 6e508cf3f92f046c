"""Evaluate a tiny random Qwen3.5 end to end: samples are kept, resumed, separated by origin, and graded again."""

import json
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import pandas
import pytest

import evaluate_model
from milepost.checkpoints.manifest import read_manifest, write_manifest
from milepost.common.errors import UserError
from milepost.configuration.provenance import sampler
from milepost.configuration.schema import Reward, TinyModel
from milepost.evaluation import sampling
from milepost.evaluation.problems import load_problems
from milepost.evaluation.sampling import SampleFile, origin_of, read_samples, sample_problems
from milepost.evaluation.scores import evaluate as evaluate_live
from milepost.rewards.grader import Grader
from milepost.rollout.engine import Completion, SamplingParams, request_seed, start_engine
from milepost.rollout.prompts import encode_prompt, load_tokenizer, stop_token_ids
from milepost.tiny.checkpoint import hub_tensors, model_config, random_model, write_checkpoint
from milepost.tiny.tokenizer import train_tokenizer
from settings import DRAFTING, section
from stages import flip_a_bit, job_arguments

PROBLEMS = 3
SETTINGS = {"samples_per_problem": 2, "max_response_tokens": 6, "pass_at": [1, 2], "seed": 5}
SOURCES = {"folder": "x", "file": "sums.jsonl"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The manifests of a random model and of three sums."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny, tokenizer = TinyModel(kind="dense", layers=4, hidden=64), train_tokenizer()
    config = model_config(tiny, tokenizer)
    write_checkpoint(folder / "hub", config, hub_tensors(tiny, random_model(tiny, config)), tokenizer)
    files = [file.name for file in (folder / "hub").iterdir()]
    write_manifest(folder / "download.json", "download", folder / "hub", files, {})
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {n} + {n}?"}], "label": str(2 * n)} for n in range(PROBLEMS)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"rows": PROBLEMS}
    write_manifest(folder / "sums.json", "download", folder, ["sums.jsonl"], {"config": {"dataset": SOURCES}}, facts)
    return folder


@pytest.fixture
def run(inputs, tmp_path, monkeypatch):
    """Run the entry script on these in tmp_path; return its manifest."""

    def call(model="download.json", reward=None, engine=None, code="c", versions=None, **settings):
        engine = section("engine", kind="cpu", **(engine or {}))
        evaluation = section("evaluation", **SETTINGS | settings)
        config = {"evaluation": evaluation.model_dump(), "engine": engine.model_dump(), "reward": reward or {}}
        job = job_arguments(config, sampler=sampler(evaluation, engine, code, versions or {}))
        arguments = {
            "--model": inputs / model,
            "--data": inputs / "sums.json",
            "--samples": tmp_path / "eval" / "base.jsonl",
            "--manifest": tmp_path / "eval" / "base.json",
        }
        monkeypatch.setattr(
            sys,
            "argv",
            ["evaluate_model.py", *job, *(str(x) for pair in arguments.items() for x in pair)],
        )
        evaluate_model.main()
        return read_manifest(tmp_path / "eval" / "base.json").require(digests=True)

    return call


def forbidden(*_):
    pytest.fail("an engine was started")


def content(path):
    """The file's lines without timing."""
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in path.open()]


def test_every_sample_and_the_scores_are_written(run, tmp_path):
    facts = run().facts
    _, samples, settled = read_samples(tmp_path / "eval" / "base.jsonl")
    assert settled == len(samples)
    assert [(sample.problem, sample.sample) for sample in samples] == [
        (p, s) for p in range(PROBLEMS) for s in range(2)
    ]
    assert all(sample.seed == request_seed(5, sample.problem, sample.sample) for sample in samples)
    assert all(1 <= sample.tokens <= 6 and sample.prompt[0]["role"] == "user" for sample in samples)
    assert len({sample.response for sample in samples}) > 1
    assert (facts["dataset"], facts["problems"], facts["samples_per_problem"]) == ("sums", PROBLEMS, 2)
    assert facts["total_tokens"] == sum(sample.tokens for sample in samples)
    assert facts["truncated_share"] == sum(sample.finish == "length" for sample in samples) / 6
    assert facts["no_think_end_share"] == 1 and facts["average"] == 0 and facts["pass_at"] == {"1": 0, "2": 0}
    assert [len(row["correct"]) for row in facts["per_problem"]] == [2] * PROBLEMS


def test_run_that_was_cut_in_the_middle_of_a_line_ends_with_the_same_file(run, tmp_path, monkeypatch):
    run()
    samples = tmp_path / "eval" / "base.jsonl"
    whole, lines = content(samples), samples.read_bytes().splitlines(keepends=True)
    samples.write_bytes(b"".join([lines[3], lines[1], lines[5][:50]]))
    asked, start = [], evaluate_model.start_engine

    def spy(*arguments, max_requests):
        assert max_requests == 6, "an engine makes room for no more"
        engine = start(*arguments, max_requests)
        generate = engine.generate
        engine.generate = lambda requests, *rest: asked.extend(requests) or generate(requests, *rest)
        return engine

    monkeypatch.setattr(evaluate_model, "start_engine", spy)
    run()
    assert len(asked) == 4, "only what was missing is sampled"
    assert content(samples) == whole


def test_more_samples_are_added_to_those_that_are_there(run, tmp_path):
    run(samples_per_problem=1, pass_at=[1])
    first = content(tmp_path / "eval" / "base.jsonl")
    assert run().facts["samples_per_problem"] == 2
    both = content(tmp_path / "eval" / "base.jsonl")
    assert [line for line in both if line.get("sample") != 1] == first


def test_another_reward_grades_again_without_sampling(run, tmp_path, monkeypatch):
    run()
    monkeypatch.setattr(evaluate_model, "start_engine", forbidden)
    samples = tmp_path / "eval" / "base.jsonl"
    lines = [json.loads(line) for line in samples.open()]
    for line, problem in zip(lines, [0, 0, 1, 1, 2, 2], strict=True):
        line["response"] = f"\\boxed{{{2 * problem}}}"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(reward={"max_seconds": 9.0}).facts["average"] == 0
    assert [line["reward"] for line in content(samples)] == [0] * 6
    scores = run(reward={"think_block": "optional"}).facts
    assert (scores["average"], scores["majority"], scores["no_think_end_share"]) == (1, 1, 0)
    graded = [(line["label"], line["answer"], line["correct"], line["reward"]) for line in content(samples)]
    assert graded == [(str(2 * p), str(2 * p), True, 1.0) for p in (0, 0, 1, 1, 2, 2)]


def test_the_samples_load_into_pandas_with_their_labels_and_grades(run, tmp_path):
    facts = run().facts
    table = pandas.read_json(tmp_path / "eval/base.jsonl", lines=True, dtype={"label": str})
    assert table.groupby("problem")["reward"].mean().mean() == facts["average"]
    assert (table["finish"] == "length").mean() == facts["truncated_share"]
    assert [*table["label"]] == [str(2 * p) for p in (0, 0, 1, 1, 2, 2)]
    assert set(table["reason"]) == {reason for row in facts["per_problem"] for reason in row["reasons"]}
    assert table["origin"].nunique() == 1 and not table[["correct", "reward"]].isna().any(axis=None)


def test_fewer_samples_are_graded_and_the_others_kept(run, tmp_path, monkeypatch):
    run()
    whole = content(tmp_path / "eval/base.jsonl")
    monkeypatch.setattr(evaluate_model, "start_engine", forbidden)
    assert run(samples_per_problem=1, pass_at=[1]).facts["samples_per_problem"] == 1
    lines = content(tmp_path / "eval/base.jsonl")
    assert [line["response"] for line in lines] == [line["response"] for line in whole]
    assert ["reward" in line for line in lines] == [True, False] * PROBLEMS
    run()
    assert content(tmp_path / "eval/base.jsonl") == whole


def test_a_file_of_something_else_is_kept_beside_the_samples(run, tmp_path):
    """Such as the samples of an older version, whose first line was their origin."""
    old = b'{"origin": {}, "settled": 1}\n{"problem": 0}\n'
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/base.jsonl").write_bytes(old)
    run()
    assert (tmp_path / "eval/base.unknown.jsonl").read_bytes() == old
    assert len(content(tmp_path / "eval/base.jsonl")) == 6


def test_samples_of_two_origins_are_never_read_as_one(run, tmp_path):
    run()
    path = tmp_path / "eval/base.jsonl"
    lines = [json.loads(line) for line in path.open()]
    lines[2]["origin"] = "other"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    origin, samples, settled = read_samples(path)
    assert (origin, len(samples), settled) == (lines[0]["origin"], 2, 2)


def test_less_memory_for_the_engine_keeps_the_samples(run, monkeypatch):
    scores = run().facts
    monkeypatch.setattr(evaluate_model, "start_engine", forbidden)
    assert run(mem_fraction_static=0.5).facts == scores


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"code": "other"}, False),
        ({"versions": {"torch": "0.1"}}, False),
        ({"versions": {"sglang": "0.1"}}, False),
        ({"engine": {"speculation": DRAFTING}}, False),
        ({"engine": {"server_arguments": {"dtype": "half"}}}, False),
        ({"engine": {"max_running_requests": 2}}, True),
        ({"model": "other.json"}, False),
        ({"seed": 6}, False),
        ({"top_p": 0.9}, False),
        ({"top_k": 5}, False),
        ({"max_response_tokens": 5}, False),
        ({"presence_penalty": 1.0}, False),
        ({"enable_thinking": False}, False),
        ({"bootstrap_samples": 7, "pass_at": [2]}, True),
        ({"reward": {"think_block": "optional"}}, True),
    ],
    ids=str,
)
def test_samples_are_reused_only_if_nothing_they_depend_on_changed(run, inputs, tmp_path, monkeypatch, changes, kept):
    run()
    other = shutil.copytree(inputs / "hub", tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    write_manifest(inputs / "other.json", "download", other, [file.name for file in other.iterdir()], {})
    asked = []

    def start(*_, **__):
        asked.append("an engine")
        raise UserError("asked for")

    monkeypatch.setattr(evaluate_model, "start_engine", start)
    with nullcontext() if kept else pytest.raises(UserError, match="asked for"):
        run(**changes)
    assert bool(asked) != kept


def test_samples_are_reused_for_new_labels_but_never_for_other_prompts(inputs):
    problems = load_problems(read_manifest(inputs / "sums.json"))
    relabelled = [replace(problem, label="0") for problem in problems]
    asked_otherwise = [replace(problem, messages=[{"role": "user", "content": "2?"}]) for problem in problems]
    was = origin_of({}, problems)
    assert origin_of({}, relabelled) == was
    assert origin_of({}, asked_otherwise) != was
    assert origin_of({}, problems[::-1]) != was


def test_samples_of_other_weights_or_another_protocol_are_never_scored(run, inputs, tmp_path, capsys):
    run()
    warm = content(tmp_path / "eval" / "base.jsonl")
    run(temperature=0.5)
    assert "of other weights or settings" in capsys.readouterr().err
    cold = content(tmp_path / "eval" / "base.jsonl")
    assert {line["origin"] for line in cold}.isdisjoint(line["origin"] for line in warm)
    assert [line["response"] for line in cold] != [line["response"] for line in warm]

    other = shutil.copytree(inputs / "hub", tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    write_manifest(inputs / "other.json", "download", other, [file.name for file in other.iterdir()], {})
    run(temperature=0.5, model="other.json")
    assert "of other weights or settings" in capsys.readouterr().err


def test_samples_of_an_earlier_protocol_are_reused(run, tmp_path, monkeypatch):
    run()
    whole = (tmp_path / "eval" / "base.jsonl").read_bytes()
    run(temperature=0.5)
    monkeypatch.setattr(evaluate_model, "start_engine", forbidden)
    run()
    assert (tmp_path / "eval" / "base.jsonl").read_bytes() == whole
    run(temperature=0.5)


class Unseeded:
    """An engine that ignores seeds, like SGLang; a worker may have failed in each batch."""

    is_reproducible = False
    weights_wanted = None

    def __init__(self, failures=()):
        self.batches, self.failures, self.repeated = [], list(failures), 0
        self.requests, self.params = [], None

    def generate(self, requests, params, on_done):
        self.requests, self.params = [*self.requests, *requests], params
        self.batches.append(len(requests))
        self.repeated += self.failures.pop(0) if self.failures else 0
        for index in range(len(requests)):
            on_done(index, Completion([len(self.batches)], [0.0], "stop"))


@pytest.fixture
def draw(inputs, tmp_path):
    """Sample with an engine into a file; return in which batch each sample was drawn."""
    tokenizer = load_tokenizer(inputs / "hub")
    problems = load_problems(read_manifest(inputs / "sums.json"))

    def call(engine, **settings):
        settings = section("evaluation", **SETTINGS | settings)
        file = SampleFile.open(tmp_path / "samples.jsonl", origin_of(settings.protocol, problems))
        samples = sample_problems(engine, tokenizer, (7,), problems, settings, file)
        return [sample.response for sample in samples]

    return call


@pytest.mark.parametrize("thinking", [True, False])
def test_requests_follow_the_protocol(draw, inputs, tmp_path, thinking):
    engine, tokenizer, began = Unseeded(), load_tokenizer(inputs / "hub"), time.perf_counter()
    drawn = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "presence_penalty": 1.5}
    draw(engine, max_response_tokens=77, enable_thinking=thinking, **drawn)
    took = time.perf_counter() - began
    assert engine.params == SamplingParams(max_new_tokens=77, stop_token_ids=(7,), **drawn)
    problems = load_problems(read_manifest(inputs / "sums.json"))
    prompts = [encode_prompt(tokenizer, problem.messages, enable_thinking=thinking) for problem in problems]
    assert [request.prompt_ids for request in engine.requests] == [prompt for prompt in prompts for _ in range(2)]
    assert len({request.seed for request in engine.requests}) == 6
    _, samples, _ = read_samples(tmp_path / "samples.jsonl")
    assert 0 <= sum(sample.seconds for sample in samples) <= took


def test_a_stopped_batch_counts_only_if_the_engine_uses_seeds(draw, tmp_path, capsys):
    """The finished samples are the short ones: if only the others were redrawn, the score would rise."""
    first = draw(Unseeded(), samples_per_problem=1, pass_at=[1])
    path = tmp_path / "samples.jsonl"
    settled = path.read_bytes()
    draw(Unseeded())
    lines = path.read_bytes().splitlines(keepends=True)
    second = json.loads(lines[1]) | {"pending": True}  # one of the second batch's three samples
    stopped = settled + json.dumps(second).encode() + b"\n"
    path.write_bytes(stopped)
    engine = Unseeded()
    assert draw(engine)[::2] == first
    assert engine.batches == [3] and "1 samples of a stopped batch" in capsys.readouterr().err
    path.write_bytes(stopped)
    engine.is_reproducible = True
    draw(engine)
    assert engine.batches == [3, 2]


def test_a_batch_in_which_the_engine_failed_is_drawn_again(draw):
    engine = Unseeded(failures=[1])
    assert draw(engine) == draw(Unseeded()) and engine.batches == [6, 6]
    with pytest.raises(UserError, match="failed in each of 3 attempts"):
        draw(Unseeded(failures=[1, 1, 1]), seed=7)


def test_long_evaluations_are_drawn_in_several_batches(draw, monkeypatch):
    monkeypatch.setattr(sampling, "BATCH", 4)
    engine = Unseeded()
    draw(engine)
    assert engine.batches == [4, 2]


@pytest.mark.parametrize("damaged", ["hub/*.safetensors", "sums.jsonl"])
def test_a_flipped_bit_in_the_weights_or_the_problems_is_found_before_sampling(run, inputs, monkeypatch, damaged):
    monkeypatch.setattr(evaluate_model, "start_engine", forbidden)
    file = next(inputs.glob(damaged))
    whole = flip_a_bit(file)
    try:
        with pytest.raises(UserError, match="its sha256 is not the one"):
            run()
    finally:
        file.write_bytes(whole)


def test_running_engine_can_be_evaluated(inputs, tmp_path):
    hub = inputs / "hub"
    tokenizer, settings = load_tokenizer(hub), section("evaluation", **SETTINGS)
    problems = load_problems(read_manifest(inputs / "sums.json"))
    engine = start_engine(hub, section("engine", kind="cpu"), tmp_path / "logs")
    with Grader(Reward()) as grader:
        stops = stop_token_ids(hub, tokenizer)
        scores = evaluate_live(
            engine, tokenizer, stops, problems, settings, grader, tmp_path / "20.jsonl", {"run": "a", "rollout": 20}
        )
    engine.close()
    json.dumps(scores, allow_nan=False)
    assert scores["problems"] == PROBLEMS and len(read_samples(tmp_path / "20.jsonl")[1]) == 2 * PROBLEMS
