"""The engine with SGLang itself: its responses, its weights, and its recovery from failures."""

import math
import os
import signal
import threading
from dataclasses import replace

import psutil
import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from gpu.sglang_arguments import ARGUMENTS
from listeners import listeners
from milepost.checkpoints import mapping
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.common.errors import UserError
from milepost.configuration.loading import load
from milepost.configuration.schema import Engine, TinyModel
from milepost.grpo.log_probs import token_log_probs
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model
from milepost.qwen3_5.model import hidden_states, output_weight
from milepost.qwen3_5.packed import pack
from milepost.rollout import sglang_dispatch
from milepost.rollout.engine import PAUSE, Completion, Request, SamplingParams, start_engine
from milepost.rollout.prompts import encode_prompt, load_tokenizer, stop_token_ids
from milepost.tiny.checkpoint import hub_tensors, model_config, random_model, write_checkpoint
from milepost.tiny.problems import all_additions
from milepost.tiny.tokenizer import train_tokenizer
from milepost.tiny.warm_up import warm_up
from settings import DRAFTING, section

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(1800)]
VOCABULARY = 500


def settings(**changes) -> Engine:
    arguments = ARGUMENTS | changes.pop("server_arguments", {})
    return section("engine", mem_fraction_static=0.15, server_arguments=arguments, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two checkpoints of one shape, a mixture of experts, and two checkpoints as deep as the recipes'."""
    tokenizer, root = train_tokenizer(), tmp_path_factory.mktemp("hub")
    for name, tiny in {
        "one": TinyModel(kind="dense", hidden=256, head_dim=64),
        "other": TinyModel(kind="dense", hidden=256, head_dim=64, seed=1),
        "moe": TinyModel(kind="moe", hidden=256, head_dim=64),
        "deep dense": TinyModel(kind="dense", layers=64, hidden=512, head_dim=64),
        "deep moe": TinyModel(kind="moe", layers=40, hidden=512, head_dim=64),
    }.items():
        config = model_config(tiny, tokenizer)
        write_checkpoint(root / name, config, hub_tensors(tiny, random_model(tiny, config)), tokenizer)
    return root


@pytest.fixture(scope="module")
def watched(folders):
    """An engine, and the sockets that its processes listened on while it started and answered."""
    with listeners() as seen:
        running = start_engine(folders / "one", settings(), folders / "logs")
        running.generate(requests(5, 64), SamplingParams(max_new_tokens=8))
    yield running, seen
    running.close()


@pytest.fixture(scope="module")
def engine(watched):
    return watched[0]


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def requests(*lengths):
    return [Request(prompt, seed) for seed, prompt in enumerate(prompts(*lengths))]


def tensors(folder, text_only=True):
    """The weights of a checkpoint as a trainer sends them: on the GPU, without those that never train."""
    hub = HubCheckpoint(folder)
    for name in hub:
        if not (text_only and name.startswith(("model.visual.", "mtp."))):
            yield name, hub.read(name).cuda()


@torch.no_grad()
def transformers_log_probs(folder, rows, dtype=torch.bfloat16, temperature=1.0):
    """Transformers' log-probs of each row: (length - 1, vocabulary)."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).cuda().eval()
    for row in rows:
        logits = model(input_ids=torch.tensor([row], device="cuda")).logits[0, :-1]
        yield (logits.float() / temperature).log_softmax(-1).cpu()


def whole(asked, completions):
    """Prompts followed by their responses."""
    return [request.prompt_ids + completion.token_ids for request, completion in zip(asked, completions, strict=True)]


def of_sampled(asked, completions, log_probs):
    """The log-probs of only the sampled tokens, concatenated."""
    found = []
    for request, completion, of_row in zip(asked, completions, log_probs, strict=True):
        first = len(request.prompt_ids) - 1
        found.append(of_row[first:].gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0])
    return torch.cat(found)


def sampled_log_probs(completions):
    return torch.cat([torch.tensor(completion.log_probs) for completion in completions])


def log_prob_differences(folder, asked, completions, temperature=1.0):
    """|engine - transformers in bf16| for every sampled token."""
    expected = transformers_log_probs(folder, whole(asked, completions), temperature=temperature)
    return (of_sampled(asked, completions, expected) - sampled_log_probs(completions)).abs()


def check(folder, engine, **params):
    asked = requests(5, 64, 130, 5)
    completions = engine.generate(asked, SamplingParams(max_new_tokens=48, **params))
    far = log_prob_differences(folder, asked, completions, params.get("temperature", 1.0) or 1.0)
    assert far.mean() < 0.02 and far.max() < 0.3, (far.mean(), far.max())
    return completions


def test_nothing_listens_beyond_loopback(watched):
    _, seen = watched
    assert seen.loopback  # its HTTP server; sockets on other interfaces would have been seen too
    assert not seen.open, seen.open


@pytest.mark.parametrize("params", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.8, "top_k": 50}])
def test_log_probs_are_transformers(folders, engine, params):
    completions = check(folders / "one", engine, **params)
    assert all(len(completion.token_ids) == 48 and completion.finish == "length" for completion in completions)


@torch.no_grad()
def trainer_log_probs(folder, asked, completions):
    """The log-probs of the sampled tokens under the training model, in bf16."""
    architecture, hub = Architecture.from_folder(folder), HubCheckpoint(folder)
    model = build_model(architecture, dtype=torch.bfloat16).cuda()
    mapping.from_hub(model, architecture, hub)
    rows = whole(asked, completions)
    ids, positions, packed = pack(rows, device="cuda")
    ends = torch.tensor([len(row) for row in rows]).cumsum(0).tolist()
    sampled = torch.cat([torch.arange(end - len(c.token_ids), end) for end, c in zip(ends, completions, strict=True)])
    sampled = sampled.cuda()
    hidden = hidden_states(model, ids, positions, packed)[sampled - 1]
    return token_log_probs(hidden, output_weight(model), ids[0, sampled], temperature=1.0, chunk=256)[0].cpu()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["deep dense", "deep moe"])
def test_engine_and_trainer_differ_by_bf16_s_rounding_alone(folders, kind):
    """Over many random layers rounding errors grow in both; they may differ by no more than that."""
    engine = start_engine(folders / kind, settings(), folders / "logs")
    asked = requests(5, 64, 130, 40)
    completions = engine.generate(asked, SamplingParams(max_new_tokens=64))
    engine.close()
    sampled, trained = sampled_log_probs(completions), trainer_log_probs(folders / kind, asked, completions)
    in_fp32 = transformers_log_probs(folders / kind, whole(asked, completions), torch.float32)
    exact = of_sampled(asked, completions, in_fp32)
    of_engine, of_trainer, between = (
        (one - other).abs().mean().item() for one, other in ((sampled, exact), (trained, exact), (sampled, trained))
    )
    print(f"{kind}: from fp32 the engine {of_engine:.4f}, the trainer {of_trainer:.4f}; from another {between:.4f}")
    assert of_engine < 2 * of_trainer and of_trainer < 2 * of_engine
    assert between < 1.5 * math.hypot(of_engine, of_trainer)


def test_a_stop_token_ends_an_answer_and_is_in_it(engine):
    asked = requests(9, 9, 9, 9)
    free = engine.generate(asked, SamplingParams(max_new_tokens=32, temperature=0))
    stop = free[0].token_ids[7]
    stopped = engine.generate(asked, SamplingParams(max_new_tokens=32, temperature=0, stop_token_ids=(stop,)))
    first = free[0].token_ids.index(stop)
    assert stopped[0].token_ids == free[0].token_ids[: first + 1]
    assert stopped[0].finish == "stop" and len(stopped[0].log_probs) == first + 1


def test_a_pause_keeps_what_was_sampled_and_the_responses_go_on(folders, engine):
    limit, repeated = 256, engine.repeated
    (nearly_done, *others), params = requests(9, *[64] * 40), SamplingParams(max_new_tokens=256)
    nearly_done = replace(nearly_done, prefix_ids=prompts(limit - 6)[0])
    asked = [nearly_done, *others]
    found = engine.generate(asked, params, lambda index, completion: PAUSE)
    assert found[0].finish == "length" and len(found[0].token_ids) == 6
    kept = found[1:]
    assert {completion.finish for completion in kept} == {"paused"}
    assert any(completion.token_ids for completion in kept)
    rest = engine.generate([replace(r, prefix_ids=c.token_ids) for r, c in zip(others, kept, strict=True)], params)
    joined = [
        Completion(c.token_ids + more.token_ids, c.log_probs + more.log_probs, more.finish)
        for c, more in zip(kept, rest, strict=True)
    ]
    assert all(len(c.token_ids) == len(c.log_probs) == limit for c in joined)
    far = log_prob_differences(folders / "one", others, joined)
    assert far.mean() < 0.02 and far.max() < 0.3, (far.mean(), far.max())
    assert engine.repeated == repeated


def test_a_sleep_frees_memory_and_new_weights_take_effect(folders, engine):
    before = torch.cuda.mem_get_info()[0]
    engine.sleep()
    assert torch.cuda.mem_get_info()[0] - before > 0.1 * torch.cuda.mem_get_info()[1]
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate(requests(3), SamplingParams(max_new_tokens=2))
    engine.wake()
    with pytest.raises(RuntimeError, match="load_weights"):
        engine.generate(requests(3), SamplingParams(max_new_tokens=2))
    engine.load_weights(tensors(folders / "other"))
    check(folders / "other", engine)
    engine.load_weights(tensors(folders / "one"))  # without a sleep between
    check(folders / "one", engine)


def test_what_is_sent_is_what_is_held(folders, engine):
    engine.load_weights(tensors(folders / "one"))
    engine.check_weights(lambda: engine.load_weights(tensors(folders / "one")))
    check(folders / "one", engine)
    with pytest.raises(RuntimeError, match="equality failed"):
        engine.check_weights(lambda: engine.load_weights(tensors(folders / "other")))
    engine.load_weights(tensors(folders / "one"))


@pytest.mark.parametrize("victim", ["the server", "its scheduler"])
def test_a_killed_server_is_restarted_with_the_current_weights(folders, engine, victim):
    engine.load_weights(tensors(folders / "other"))
    engine.weights_wanted = lambda: engine.load_weights(tensors(folders / "other"))
    process = psutil.Process(engine.servers[0]._process.pid)
    if victim == "its scheduler":
        process = next(child for child in process.children(recursive=True) if "scheduler" in " ".join(child.cmdline()))
    threading.Timer(1.0, os.kill, (process.pid, signal.SIGKILL)).start()
    asked = requests(*[40] * 64)
    completions = engine.generate(asked, SamplingParams(max_new_tokens=1500))
    assert all(len(completion.token_ids) == 1500 for completion in completions)
    assert engine.servers[0].starts > 1
    assert log_prob_differences(folders / "other", asked[:4], completions[:4]).mean() < 0.02


def test_a_hanging_scheduler_is_restarted(folders, engine, monkeypatch):
    monkeypatch.setattr(sglang_dispatch, "PATIENCE", 20.0)
    monkeypatch.setattr(sglang_dispatch, "FIRST_PATIENCE", 20.0)
    monkeypatch.setattr(sglang_dispatch, "CHECK_INTERVAL", 2.0)
    engine.weights_wanted = lambda: engine.load_weights(tensors(folders / "other"))
    starts = engine.servers[0].starts
    children = psutil.Process(engine.servers[0]._process.pid).children(recursive=True)
    scheduler = next(child for child in children if "scheduler" in " ".join(child.cmdline()))
    threading.Timer(1.0, os.kill, (scheduler.pid, signal.SIGSTOP)).start()
    engine.generate(requests(*[40] * 64), SamplingParams(max_new_tokens=1500))
    assert engine.servers[0].starts == starts + 1


def test_a_seed_decides_an_answer_where_sglang_is_deterministic(folders):
    engine = start_engine(
        folders / "one", settings(server_arguments={"enable_deterministic_inference": True}), folders / "logs"
    )
    try:
        params, asked = SamplingParams(max_new_tokens=32), requests(9, 40, 9)
        together = engine.generate(asked, params)
        alone = engine.generate(asked[1:2], params)
        assert together[1].token_ids == alone[0].token_ids
        assert together[0].token_ids != together[2].token_ids
    finally:
        engine.close()


@pytest.fixture(scope="module")
def warmed_up(root, tmp_path_factory):
    """The demo's warmed-up mixture of experts, whose greedy responses are stable under rounding.

    In a random model the top tokens are nearly tied, so rounding changes a greedy response within 32 tokens.
    """
    folder, tokenizer = tmp_path_factory.mktemp("hub") / "warmed up", train_tokenizer()
    configuration = load(root / "config" / "config.yaml", root / "config" / "models", {"models": ["tiny_moe"]})
    tiny = configuration.models["tiny_moe"].source.tiny
    config = model_config(tiny, tokenizer)
    model = random_model(tiny, config)
    warm_up(model, tokenizer, tiny)
    write_checkpoint(folder, config, hub_tensors(tiny, model), tokenizer)
    return folder


def test_drafting_with_the_mtp_head_changes_no_answer(warmed_up):
    """The untrained draft is hardly ever accepted; responses equal those without drafting, token by token."""
    tokenizer = load_tokenizer(warmed_up)
    questions = [[{"role": "user", "content": addition.question}] for addition in all_additions("evaluation")[::16]]
    asked = [Request(encode_prompt(tokenizer, question, True), seed) for seed, question in enumerate(questions)]
    greedy = SamplingParams(max_new_tokens=32, temperature=0, stop_token_ids=stop_token_ids(warmed_up, tokenizer))
    plain = start_engine(warmed_up, settings(), warmed_up / "logs")
    expected = [completion.token_ids for completion in plain.generate(asked, greedy)]
    plain.close()
    engine = start_engine(warmed_up, settings(speculation=DRAFTING), warmed_up / "logs")
    try:
        assert [completion.token_ids for completion in engine.generate(asked, greedy)] == expected
        completions = engine.generate(asked, SamplingParams(max_new_tokens=32))
        assert log_prob_differences(warmed_up, asked, completions).mean() < 0.05
        for completion in completions:
            assert completion.drafting.drafted >= completion.drafting.accepted
            assert completion.drafting.passes <= len(completion.token_ids) <= 3 * completion.drafting.passes
        engine.sleep()
        engine.wake()
        engine.load_weights(tensors(warmed_up))
        assert [completion.token_ids for completion in engine.generate(asked, greedy)] == expected
    finally:
        engine.close()


def test_the_draft_gets_its_weights_in_the_same_sync(folders):
    """With a head that knows two tokens the draft is right half of the time; sent its norm negated, the other half."""
    engine = start_engine(folders / "moe", settings(speculation=DRAFTING), folders / "logs")
    asked, greedy = requests(5, 64, 17, 40), SamplingParams(max_new_tokens=64, temperature=0)

    def weights(negated):
        for name, tensor in tensors(folders / "moe", text_only=False):
            if name == "lm_head.weight":
                row = tensor[7].clone()
                tensor.zero_()
                tensor[7], tensor[8] = row, -row
            yield name, -2 - tensor if negated and name == "mtp.norm.weight" else tensor

    def accepted(negated):
        engine.load_weights(weights(negated))
        return sum(completion.drafting.accepted for completion in engine.generate(asked, greedy))

    try:
        before, without = accepted(False), accepted(True)
        assert before != without and accepted(False) == before
    finally:
        engine.close()


def test_a_start_that_fails_says_why_in_one_line(folders, tmp_path):
    with pytest.raises(UserError, match="did not start: ") as caught:
        start_engine(tmp_path / "nothing", settings(), tmp_path)
    assert "\n" not in str(caught.value)
