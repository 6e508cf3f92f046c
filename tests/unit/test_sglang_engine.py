"""The SGLang engine on a CPU: servers that start, answer, die, hang and are restarted.

The servers are real processes of `rollout.sglang_launch`, in which tests/stand_ins/sglang, a small package that speaks
SGLang's protocol, replaces SGLang. tests/gpu/ runs the same calls against SGLang itself.
"""

import os
import resource
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from milepost.common.errors import UserError
from milepost.qwen3_5.architecture import Architecture
from milepost.rollout import sglang_dispatch, sglang_engine
from milepost.rollout.engine import PAUSE, Drafting, Request, SamplingParams
from milepost.rollout.sglang_engine import SglangEngine
from milepost.rollout.sglang_server import Server, server_arguments
from settings import DRAFTING, section
from tiny_hub import MOE, make_tiny_hub

STAND_INS = Path(__file__).parents[1] / "stand_ins"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """``start(servers, **server_arguments)`` -> a running engine."""
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    engines = []

    def call(servers=1, settings=None, **arguments):
        settings = settings or section("engine", server_arguments=arguments)
        parts = [Server(Path("model"), settings, index, tmp_path / "logs") for index in range(servers)]
        engine = SglangEngine(Path("model"), settings, parts)
        engines.append(engine)
        engine.start()
        return engine

    yield call
    for engine in engines:
        engine.close()


def requests(count, length=3):
    return [Request([number] * length, seed=1000 + number) for number in range(count)]


def pid(server):
    return server._process.pid


def processes(completions):
    """The processes that answered."""
    return {-int(completion.log_probs[0]) for completion in completions}


PARAMS = SamplingParams(max_new_tokens=2)


def test_answers_come_in_the_order_of_requests_from_all_servers(start):
    engine, seen = start(2), []
    completions = engine.generate(requests(20), PARAMS, lambda index, completion: seen.append(index))
    assert [completion.token_ids for completion in completions] == [[1000 + n, n] for n in range(20)]
    assert processes(completions) == {pid(server) for server in engine.servers}
    assert sorted(seen) == list(range(20))


def test_more_requests_are_under_way_than_files_may_usually_be_open(start):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, before[1]))
    try:
        engine = start(settings=section("engine", max_running_requests=100))
        completions = engine.generate(requests(100, length=50), PARAMS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [completion.token_ids for completion in completions] == [[1000 + n, n] for n in range(100)]
    assert engine.repeated == 0


def test_drafting_and_routing_are_handed_on(start):
    engine = start(settings=section("engine", speculation=DRAFTING, replay_routing=True))
    (completion,) = engine.generate(requests(1, length=4), SamplingParams(max_new_tokens=2, with_routing=True))
    assert completion.drafting == Drafting(passes=5, drafted=10, accepted=4)
    assert completion.routing.tolist() == torch.arange(15).view(5, 3).tolist()
    (completion,) = engine.generate(requests(1), PARAMS)
    assert completion.routing is None


def test_a_continued_response_is_asked_for_behind_its_beginning_within_its_limit(start):
    (completion,) = start(1).generate([Request([7, 8], 1000, [9])], SamplingParams(max_new_tokens=4))
    assert completion.token_ids == [1000, 7, 8]


def test_requests_that_are_added_are_answered_in_the_same_batch(start):
    engine, more = start(2), [Request([number], 1000 + number) for number in (20, 21, 22)]
    completions = engine.generate(requests(20), PARAMS, lambda index, _: more[index : index + 1] if index < 3 else None)
    assert sorted(completion.token_ids for completion in completions) == [[1000 + n, n] for n in range(23)]
    assert [completion.token_ids for completion in completions[:20]] == [[1000 + n, n] for n in range(20)]


def test_a_pause_keeps_what_was_sampled_and_the_engine_goes_on_with_it(start):
    engine = start(2)
    asked = [Request([5] * length, 1000) for length in (7, 7, 200, 200, *[300] * 20)]
    seen = []

    def on_done(index, completion):
        seen.append(index)
        return PAUSE if len(seen) == 2 else None

    completions = engine.generate(asked, SamplingParams(max_new_tokens=8), on_done)
    assert sorted(seen) == [0, 1]
    assert [completion.finish for completion in completions] == ["length"] * 2 + ["paused"] * 22
    kept = {len(completion.token_ids) for completion in completions[2:]}
    assert kept == {0, 4}, "some were under way, others in line"
    assert all(len(completion.log_probs) == len(completion.token_ids) for completion in completions)
    rest = [Request([5] * 7, 1000, completion.token_ids) for completion in completions[2:6]]
    assert len(engine.generate(rest, SamplingParams(max_new_tokens=8))) == 4
    assert engine.repeated == 0


@pytest.mark.timeout(60)
def test_a_server_that_does_not_obey_a_pause_is_replaced(start, monkeypatch):
    monkeypatch.setattr(sglang_dispatch, "ABORT_SECONDS", 1.0)
    engine = start(2)
    deaf = pid(engine.servers[1])

    def on_done(index, completion):
        os.kill(deaf, signal.SIGSTOP)
        return PAUSE

    asked = [Request([5] * 7, 1000), *[Request([5] * 50, 1000)] * 7]
    completions = engine.generate(asked, SamplingParams(max_new_tokens=8), on_done)
    assert [completion.finish for completion in completions] == ["length"] + ["paused"] * 7
    engine.weights_wanted = lambda: engine.load_weights([])
    assert [c.token_ids for c in engine.generate(requests(8), PARAMS)] == [[1000 + n, n] for n in range(8)]
    assert pid(engine.servers[1]) != deaf


def test_a_server_that_dies_is_restarted_and_its_requests_are_asked_again(start, capsys):
    engine = start(2)
    victim = engine.servers[0]
    old = pid(victim)
    threading.Timer(0.3, os.kill, (old, signal.SIGKILL)).start()
    completions = engine.generate(requests(40, length=30), PARAMS)
    assert [completion.token_ids for completion in completions] == [[1000 + n, n] for n in range(40)]
    assert pid(victim) != old and victim.starts == 2
    assert "restarting it" in capsys.readouterr().err


def test_the_only_server_may_die(start):
    engine = start(1)
    threading.Timer(0.2, os.kill, (pid(engine.servers[0]), signal.SIGKILL)).start()
    assert len(engine.generate(requests(12, length=20), PARAMS)) == 12


@pytest.mark.timeout(60)
def test_a_server_that_compiles_kernels_for_its_first_answer_does_not_hang(start, monkeypatch):
    monkeypatch.setattr(sglang_dispatch, "PATIENCE", 2)
    monkeypatch.setattr(sglang_dispatch, "CHECK_INTERVAL", 0.1)
    engine = start(1, random_seed=14)
    (server,) = engine.servers
    assert len(engine.generate(requests(4), PARAMS)) == 4
    assert (server.starts, engine.repeated) == (1, 0)

    # Now it may be silent for two seconds; its next process, which compiles again, for longer.
    threading.Timer(0.2, os.kill, (pid(server), signal.SIGSTOP)).start()
    assert len(engine.generate(requests(8, length=20), PARAMS)) == 8
    assert server.starts == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seconds", [0, 0.2], ids=["before", "meanwhile"])
@pytest.mark.parametrize("servers", [1, 2])
def test_servers_that_hang_are_restarted(start, monkeypatch, servers, seconds):
    monkeypatch.setattr(sglang_dispatch, "PATIENCE", 1)
    monkeypatch.setattr(sglang_dispatch, "FIRST_PATIENCE", 1)
    monkeypatch.setattr(sglang_dispatch, "CHECK_INTERVAL", 0.1)
    engine = start(servers)

    def hang():
        for server in engine.servers:
            os.kill(pid(server), signal.SIGSTOP)

    if seconds:
        threading.Timer(seconds, hang).start()
    else:
        hang()
    assert len(engine.generate(requests(24, length=20), PARAMS)) == 24
    assert all(server.starts >= 2 for server in engine.servers)  # one may be slow to answer, too, on a busy machine
    assert engine.repeated >= (servers if seconds else 0) and not engine.is_reproducible


def test_a_failed_restart_is_retried_while_the_other_servers_answer(start, monkeypatch):
    engine = start(2)
    begin, failures = engine._start, [UserError("no memory")]

    def start_server(server):
        if failures:
            raise failures.pop()
        begin(server)

    monkeypatch.setattr(engine, "_start", start_server)
    os.kill(pid(engine.servers[0]), signal.SIGKILL)
    assert len(engine.generate(requests(24, length=20), PARAMS)) == 24
    failures.extend([UserError("no memory")] * 9)
    os.kill(pid(engine.servers[1]), signal.SIGKILL)
    engine.servers[0].kill()
    with pytest.raises(UserError, match="failed again after 3 restarts: no memory"):
        engine.generate(requests(24, length=20), PARAMS)


def test_a_server_that_died_between_two_calls_is_restarted(start):
    engine = start(1)
    os.kill(pid(engine.servers[0]), signal.SIGKILL)
    assert len(engine.generate(requests(2), PARAMS)) == 2


def test_an_interrupt_aborts_what_runs_and_the_engine_goes_on(start):
    engine = start(1)

    def interrupt(index, completion):
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([*requests(1, length=1), *requests(3, length=500)], PARAMS, interrupt)
    assert time.monotonic() - began < 5, "requests that nobody waits for were not aborted"


@pytest.mark.timeout(60)
def test_an_interrupt_does_not_wait_for_a_server_that_hangs(start, monkeypatch):
    monkeypatch.setattr(sglang_dispatch, "ABORT_SECONDS", 1)
    engine = start(2)

    def interrupt(index, completion):
        os.kill(pid(engine.servers[1]), signal.SIGSTOP)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([*requests(1, length=1), *requests(3, length=500)], PARAMS, interrupt)
    assert engine.servers[0].alive and not engine.servers[1].alive


def test_only_a_restarted_server_s_weights_are_checked_while_the_others_answer(start, monkeypatch):
    engine, asked = start(2), []
    monkeypatch.setattr(Server, "call", lambda server, *_, **__: asked.append(server.index))
    engine.check_weights(lambda: None)
    assert set(asked) == {0, 1}
    asked.clear()
    engine._in_need = engine.servers[1]  # as while `weights_wanted` is called
    engine.check_weights(lambda: None)
    assert set(asked) == {1}


def test_a_restart_slower_than_all_responses_is_awaited_in_the_next_batch(start):
    engine = start(2)
    engine.servers[1].kill()
    engine.generate(requests(2), PARAMS)
    assert not engine.servers[1].alive  # what comes next may need its memory
    engine.generate(requests(2), PARAMS)
    assert engine.servers[1].alive
    assert pid(engine.servers[1]) in processes(engine.generate(requests(2), PARAMS))


def test_a_server_that_fails_at_the_start_says_why_in_one_line(start):
    with pytest.raises(
        UserError, match="CUDA out of memory, as it were: fix that and run again; its log is "
    ) as caught:
        start(1, random_seed=13)
    assert "\n" not in str(caught.value)


def test_a_response_that_sglang_truncates_below_the_limit_is_an_error(start):
    """SGLang truncates what its memory can't hold; the response would count as wrong."""
    with pytest.raises(UserError, match="its memory holds a response of 4 tokens, not of 9: raise mem_fraction_static"):
        start(1).generate(requests(1), SamplingParams(max_new_tokens=9))


def test_a_server_s_log_is_kept_until_the_second_next_start(start, tmp_path):
    log, previous = tmp_path / "logs/sglang-0.log", tmp_path / "logs/sglang-0.previous.log"
    with pytest.raises(UserError):
        start(1, random_seed=13)
    said = log.read_text()
    engine = start(1)
    engine.servers[0].kill()
    engine.generate(requests(1), PARAMS)
    assert "as it were" in said and previous.read_text() == said and "as it were" not in log.read_text()


def test_an_unknown_sglang_argument_is_named(start):
    with pytest.raises(UserError, match=r"engine\.server_arguments: this version of SGLang has no frobnicate"):
        start(1, frobnicate=1)


def test_a_server_ends_with_the_process_that_started_it(start):
    server = start(1).servers[0]
    server._process.stdin.close()  # as the end of this process would
    server._process.wait(timeout=10)


def test_asleep_or_without_weights_nothing_is_generated(start):
    engine = start(1)
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate(requests(1), PARAMS)
    engine.wake()
    with pytest.raises(RuntimeError, match="load_weights"):
        engine.generate(requests(1), PARAMS)


def test_a_restarted_server_gets_the_current_weights(start):
    engine = start(1)
    engine._folder_is_current = False  # as after load_weights, which needs a GPU
    os.kill(pid(engine.servers[0]), signal.SIGKILL)
    with pytest.raises(UserError, match="nothing can send it the current weights"):
        engine.generate(requests(2), PARAMS)

    def supply():
        assert engine._in_need is engine.servers[0]
        engine.servers[0].holds_weights = True

    engine.close()
    engine.weights_wanted = supply
    engine.generate(requests(2), PARAMS)
    assert engine.servers[0].holds_weights


@pytest.mark.parametrize(("wanted", "expected"), [(None, 5), (3, 3), (512, 5)])
def test_a_server_sets_memory_aside_for_its_share_of_the_requests(tmp_path, monkeypatch, wanted, expected):
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    settings = section("engine", max_running_requests=wanted)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5_text", "hidden_size": 64}')
    engine = sglang_engine.start(tmp_path, settings, tmp_path / "logs", max_requests=9)
    engine.close()
    assert {server._arguments["model_path"] for server in engine.servers} == {str(tmp_path / "logs/model")}
    assert [server._arguments["max_running_requests"] for server in engine.servers] == [expected] * 2


def test_the_drafts_cache_is_part_of_the_engine_s_memory(tmp_path, monkeypatch):
    """SGLang ignores the drafts' cache: with one full-attention layer of four, it would take nearly twice its share."""
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    make_tiny_hub(tmp_path, MOE)
    weights = 2 * Architecture.from_folder(tmp_path).parameters(mtp_num_layers=1)
    gpu = SimpleNamespace(total_memory=5 * weights)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for speculation, expected in ((None, 0.6), (DRAFTING, 0.2 + 0.4 / 2)):  # the weights are shared
        settings = section("engine", mem_fraction_static=0.6, speculation=speculation)
        engine = sglang_engine.start(tmp_path, settings, tmp_path)
        engine.close()
        assert engine.servers[0]._arguments["mem_fraction_static"] == pytest.approx(expected)


def test_the_recipe_s_arguments_have_sglang_s_names():
    settings = section(
        "engine",
        gpus_per_engine=8,
        expert_parallel=8,
        mem_fraction_static=0.7,
        max_running_requests=512,
        cuda_graph_batch_sizes=[1, 2],
        speculation=DRAFTING,
        server_arguments={"attention_backend": "triton", "random_seed": 5},
    )
    arguments = server_arguments(Path("folder"), settings, 2)
    expected = {
        "model_path": "folder",
        "dtype": "bfloat16",
        "host": "127.0.0.1",
        "tp_size": 8,
        "ep_size": 8,
        "base_gpu_id": 16,
        "mem_fraction_static": 0.7,
        "max_running_requests": 512,
        "cuda_graph_bs_decode": [1, 2],
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": 2,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 3,
        "enable_multimodal": False,
        "attention_backend": "triton",
        "random_seed": 7,
    }
    assert arguments | expected == arguments
