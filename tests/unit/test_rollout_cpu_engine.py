"""The CPU engine against transformers: the same distribution and sampling, independent of the batch."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from milepost.common.errors import UserError
from milepost.rollout.engine import PAUSE, Completion, Request, SamplingParams, start_engine
from precision import assert_as_precise, computing_in, in_float64
from settings import section
from tiny_hub import DENSE, MOE, make_tiny_hub, write_weights

pytestmark = pytest.mark.numerical

VOCABULARY = 288
LENGTHS = (1, 2, 3, 5, 64, 65, 300)  # shorter than the convolution, at a chunk's borders, several chunks


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints: dense in two files, experts packed as on the Hub, experts one by one as transformers saves them."""
    root = tmp_path_factory.mktemp("rollout")
    make_tiny_hub(root / "dense", DENSE, shards=2)
    make_tiny_hub(root / "packed experts", MOE)
    make_tiny_hub(root / "single experts", MOE, fused_experts=False)
    return root


@pytest.fixture(scope="module")
def engine(folders):
    return cpu_engine(folders / "dense")


def cpu_engine(folder, **settings):
    return start_engine(folder, section("engine", kind="cpu", **settings), folder / "logs")


@pytest.fixture(params=["dense", "packed experts", "single experts"])
def folder(folders, request):
    return folders / request.param


def transformers_models(folder):
    """Transformers' model in fp32 and in float64."""
    transformers_logging.disable_progress_bar()
    options = {"experts_implementation": "eager"}  # the faster ones don't support float64
    fp32 = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)
    with in_float64():
        return fp32.eval(), AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, **options).eval()


def random_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def teacher_forced(models, requests, completions):
    """Transformers' logits (tokens, vocabulary) before each token of the completions, in fp32 and in float64."""
    for model in models:
        found = []
        for request, completion in zip(requests, completions, strict=True):
            ids = torch.tensor([request.prompt_ids + completion.token_ids])
            with computing_in(model.dtype):
                found.append(model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1])
        yield torch.cat(found)


def assert_log_probs(completions, logits, temperature=1.0):
    """The log-probs are those of the ``logits``, in fp32 and in float64, at the temperature."""
    tokens = torch.tensor([token for completion in completions for token in completion.token_ids])
    found = torch.tensor([log_prob for completion in completions for log_prob in completion.log_probs])
    assert_as_precise(found, *((x / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0] for x in logits))


def test_greedy_answers_are_those_of_transformers(folder):
    engine = cpu_engine(folder, max_running_requests=3)
    requests = [Request(prompt, seed=0) for prompt in random_prompts(*LENGTHS)]
    completions = engine.generate(requests, SamplingParams(max_new_tokens=12, temperature=0))
    assert [len(completion.token_ids) for completion in completions] == [12] * len(LENGTHS)
    logits = list(teacher_forced(transformers_models(folder), requests, completions))
    assert_log_probs(completions, logits)
    # Up to rounding, no token is likelier than the chosen one.
    found = torch.tensor([log_prob for completion in completions for log_prob in completion.log_probs])
    assert_as_precise(found, *(x.log_softmax(-1).amax(-1) for x in logits))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_whole_distribution_at_the_temperature(folder, temperature):
    requests = [Request(prompt, seed) for seed, prompt in enumerate(random_prompts(*LENGTHS))]
    params = SamplingParams(max_new_tokens=20, temperature=temperature, top_p=0.9, top_k=50)
    completions = cpu_engine(folder).generate(requests, params)
    assert_log_probs(completions, teacher_forced(transformers_models(folder), requests, completions), temperature)


def test_response_longer_than_a_cache_block_keeps_its_log_probs(folders, engine):
    requests = [Request(prompt, seed=1) for prompt in random_prompts(100)]
    completions = engine.generate(requests, SamplingParams(max_new_tokens=200))
    assert_log_probs(completions, teacher_forced(transformers_models(folders / "dense"), requests, completions))


def test_samples_follow_the_distribution(folders, engine):
    [prompt], temperature, samples = random_prompts(9), 0.3, 20000
    empty = [Completion([0], [0.0], "length")]
    _, logits = teacher_forced(transformers_models(folders / "dense"), [Request(prompt, 0)], empty)
    probs = (logits[0] / temperature).softmax(-1)
    completions = engine.generate(
        [Request(prompt, seed) for seed in range(samples)], SamplingParams(max_new_tokens=1, temperature=temperature)
    )
    counts = torch.bincount(torch.tensor([completion.token_ids[0] for completion in completions]), minlength=VOCABULARY)
    often = probs * samples >= 5
    expected = torch.cat([probs[often], probs[~often].sum()[None]]) * samples
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert freedom > 20
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def a_mixed_batch():
    """Groups with one prompt, prompts with one sample, and stops that free rows at different times."""
    prompts = random_prompts(7, 7, 20, 66, 3)
    requests = [Request(prompts[index % 5], seed) for seed, index in enumerate([0] * 8 + [1, 2, 3, 4] * 2 + [2] * 5)]
    return requests, SamplingParams(max_new_tokens=30, stop_token_ids=tuple(range(0, VOCABULARY, 12)))


@pytest.mark.parametrize(("name", "running"), [("dense", 1), ("dense", 5), ("packed experts", 9)])
def test_answers_do_not_depend_on_what_else_is_in_the_batch(folders, name, running):
    requests, params = a_mixed_batch()
    together = cpu_engine(folders / name).generate(requests, params)
    assert len({len(completion.token_ids) for completion in together}) > 5
    logits = list(teacher_forced(transformers_models(folders / name), requests, together))
    few = cpu_engine(folders / name, max_running_requests=running)
    for found in (few.generate(requests, params), few.generate(requests[::-1], params)[::-1]):
        assert [(c.token_ids, c.finish) for c in found] == [(c.token_ids, c.finish) for c in together]
        assert_log_probs(found, logits)


@pytest.mark.parametrize("name", ["dense", "packed experts"])
def test_a_response_that_is_continued_ends_as_in_one_go(folders, name):
    """Cut after each request's own number of tokens, also after none; its draws go on where they ended."""
    engine = cpu_engine(folders / name, max_running_requests=7)
    requests, params = a_mixed_batch()
    whole = engine.generate(requests, params)
    cuts = [min(number % 9, len(c.token_ids) - 1) for number, c in enumerate(whole)]
    begun = [replace(r, prefix_ids=c.token_ids[:cut]) for r, c, cut in zip(requests, whole, cuts, strict=True)]
    rest = engine.generate(begun, params)
    assert [c.token_ids for c in rest] == [c.token_ids[cut:] for c, cut in zip(whole, cuts, strict=True)]
    assert [c.finish for c in rest] == [c.finish for c in whole]
    joined = [
        Completion(c.token_ids, c.log_probs[:cut] + more.log_probs, c.finish)
        for c, cut, more in zip(whole, cuts, rest, strict=True)
    ]
    assert_log_probs(joined, teacher_forced(transformers_models(folders / name), requests, joined))


def test_a_pause_keeps_what_was_sampled_and_requests_can_be_added(engine):
    requests, params = a_mixed_batch()
    whole, seen = engine.generate(requests, params), []

    def on_done(index, completion):
        seen.append(index)
        return {3: requests[10:], 6: PAUSE}.get(len(seen))

    found = engine.generate(requests[:10], params, on_done)
    assert len(found) == len(requests)
    for index, (part, one) in enumerate(zip(found, whole, strict=True)):
        assert part.token_ids == one.token_ids[: len(part.token_ids)]
        assert part.finish == (one.finish if index in seen else "paused")
    assert any(part.finish == "paused" and part.token_ids for part in found)
    rest = engine.generate([replace(r, prefix_ids=p.token_ids) for r, p in zip(requests, found, strict=True)
                            if p.finish == "paused"], params)  # fmt: skip
    unfinished = [(p, one) for p, one in zip(found, whole, strict=True) if p.finish == "paused"]
    assert [p.token_ids + more.token_ids for (p, _), more in zip(unfinished, rest, strict=True)] == [
        one.token_ids for _, one in unfinished
    ]


def test_the_same_call_gives_the_same_bits(engine):
    requests, params = a_mixed_batch()
    first = engine.generate(requests, params)
    engine.generate(requests[:3], params)
    assert engine.generate(requests, params) == first


def test_seeds_of_one_prompt_give_different_answers(engine):
    [prompt] = random_prompts(10)
    completions = engine.generate([Request(prompt, seed) for seed in range(50)], SamplingParams(max_new_tokens=8))
    assert len({tuple(completion.token_ids) for completion in completions}) == 50


def test_answers_end_with_the_first_stop_token_or_at_the_limit(engine):
    requests, params = a_mixed_batch()
    completions = engine.generate(requests, params)
    assert {completion.finish for completion in completions} == {"stop", "length"}
    for completion in completions:
        stops = [token in params.stop_token_ids for token in completion.token_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (completion.finish == "stop")
        assert completion.finish == "stop" or len(completion.token_ids) == params.max_new_tokens
        assert len(completion.log_probs) == len(completion.token_ids)


def test_presence_penalty_counts_the_response_alone(folders, engine):
    requests = [Request(prompt, seed) for seed, prompt in enumerate(random_prompts(40, 5))]
    completions = engine.generate(requests, SamplingParams(max_new_tokens=30, temperature=0.5, presence_penalty=1.5))
    logits = list(teacher_forced(transformers_models(folders / "dense"), requests, completions))
    for penalized in logits:
        for row, tokens in zip(penalized.split(30), (c.token_ids for c in completions), strict=True):
            for position in range(30):
                row[position, list(set(tokens[:position]))] -= 1.5
    assert_log_probs(completions, logits, temperature=0.5)


def test_a_great_presence_penalty_forbids_a_second_time(engine):
    [prompt] = random_prompts(40)
    forbidding = SamplingParams(max_new_tokens=200, temperature=0.5, presence_penalty=1e4)
    for completion in engine.generate([Request(prompt, seed) for seed in range(3)], forbidding):
        assert len(set(completion.token_ids)) == 200


def test_on_done_reports_each_completion_once_as_it_finishes(engine):
    requests, params = a_mixed_batch()
    reported = []
    completions = engine.generate(requests, params, lambda *done: reported.append(done))
    assert sorted(index for index, _ in reported) == list(range(len(requests)))
    assert all(completions[index] is completion for index, completion in reported)
    lengths = [len(completion.token_ids) for _, completion in reported]
    assert lengths == sorted(lengths)


def test_new_weights_answer_as_an_engine_started_with_them(folder, tmp_path):
    new = make_tiny_hub(tmp_path, DENSE if folder.name == "dense" else MOE, seed=1)
    engine = cpu_engine(folder)
    requests, params = a_mixed_batch()
    old = engine.generate(requests, params)
    engine.load_weights((name, tensor) for name, tensor in new.items())
    assert engine.generate(requests, params) == cpu_engine(tmp_path).generate(requests, params)
    assert engine.generate(requests, params) != old


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.language_model.layers.9.input_layernorm.weight", (64,), "no such tensor"),
        ("model.language_model.norm.weight", (65,), "shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(engine, name, shape, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        engine.load_weights([(name, torch.zeros(shape))])


def test_incomplete_checkpoint_is_refused_by_name(tmp_path):
    tensors = make_tiny_hub(tmp_path)
    del tensors["model.language_model.layers.3.self_attn.k_norm.weight"]
    write_weights(tmp_path, tensors)
    with pytest.raises(UserError, match=r"layers\.3\.self_attn\.k_norm\.weight"):
        cpu_engine(tmp_path)


def test_a_sleeping_engine_wakes_as_it_was(folders):
    engine = cpu_engine(folders / "dense")
    requests, params = a_mixed_batch()
    before = engine.generate(requests, params)
    engine.sleep()
    with pytest.raises(RuntimeError, match="wake"):
        engine.generate(requests, params)
    engine.wake()
    assert engine.generate(requests, params) == before


def test_empty_prompt_is_refused_and_no_requests_give_none(engine):
    with pytest.raises(ValueError, match="request 1"):
        engine.generate([Request([1], 0), Request([], 0)], SamplingParams(max_new_tokens=1))
    assert engine.generate([], SamplingParams(max_new_tokens=1)) == []
