"""Estimates of memory and disk against hand-computed figures, other code's shapes, and measured peaks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from milepost.configuration.memory import CONTEXT_GIB, SYNC_GIB, disk_gib, estimate, rescaled_engine
from milepost.configuration.shape import architecture_of, text_config
from settings import DRAFTING, configured

RECORDED = Path(__file__).parents[2] / "benchmarks/results"
MEASURED = [
    line
    for file in ("gpu_recipes.jsonl", "gpu_training.jsonl")
    for line in map(json.loads, (RECORDED / file).read_text().splitlines())
    if line["name"] == "memory_estimate_error"
]

# Parameters of Qwen3.5-9B: 24 layers of Gated DeltaNet and 8 of attention, 4096 wide, with 32 value and 16 key heads of
# 128, or 16 heads of 256 with 4 key-value groups.
NORMS, FFN = 2 * 4096, 3 * 4096 * 12288
ATTENTION = 4096 * (2 * 16 * 256 + 2 * 4 * 256 + 16 * 256) + 2 * 256  # queries with their gate, keys, values; output
DELTA_NET = (
    4096 * (2 * 16 * 128 + 32 * 128 + 32 * 128 + 32 + 32)  # queries, keys, values, gate; beta, alpha
    + 4 * (2 * 16 * 128 + 32 * 128)  # the convolution
    + (32 + 32 + 128)  # A_log, dt_bias, norm
    + 4096 * 32 * 128  # output
)
EMBEDDING = 248320 * 4096
OF_9B = 2 * EMBEDDING + 24 * (DELTA_NET + FFN + NORMS) + 8 * (ATTENTION + FFN + NORMS) + 4096
MTP_OF_9B = ATTENTION + FFN + NORMS + 2 * 4096 * 4096 + 3 * 4096

GIB = 1024**3


def recipe(name, **changes):
    return configured({"per_model": {name: changes}}).models[name]


def estimated(name, gpu_gib=141, **changes):
    model = recipe(name, **changes)
    return estimate(architecture_of(model), model, gpu_gib)


def test_parameters_of_9b_are_those_counted_by_hand():
    architecture = architecture_of(recipe("9B"))
    assert architecture.parameters() == OF_9B
    assert architecture.parameters(mtp_num_layers=1) == OF_9B + MTP_OF_9B


@pytest.mark.parametrize("name", ["0.8B", "2B", "4B", "9B", "27B", "35B_A3B"])
def test_parameters_are_those_of_transformers_model(name):
    from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig
    from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    shape = recipe(name).architecture
    dense, experts = (Qwen3_5TextConfig, Qwen3_5ForCausalLM), (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM)
    config_class, model_class = experts if shape.experts else dense
    with torch.device("meta"):
        theirs = model_class(config_class(**text_config(shape)))
    assert architecture_of(recipe(name)).parameters() == sum(p.numel() for p in theirs.parameters())


def test_weights_gradients_and_adam_of_9b_are_those_worked_out_by_hand():
    """Two GPUs share a copy, and the four copies share Adam's states."""
    memory = estimated("9B")
    assert memory.weights == pytest.approx(2 * OF_9B / 2 / GIB)
    assert memory.gradients == pytest.approx(4 * OF_9B / 2 / GIB)
    assert memory.optimizer == pytest.approx(12 * OF_9B / 2 / 4 / GIB)
    assert memory.logits == pytest.approx(3 * 4 * 1024 * 248320 / 2 / GIB)
    parts = memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.logits
    assert memory.training == pytest.approx(parts + CONTEXT_GIB)
    assert estimated("9B", optimizer={"cpu_offload": True}).optimizer == 0
    with_mtp = estimated("9B", mtp={"train": True}, conversion={"mtp_num_layers": 1})
    assert with_mtp.weights == pytest.approx(2 * (OF_9B + MTP_OF_9B) / 2 / GIB)


def test_experts_of_35b_are_shared_by_their_own_ranks():
    """A rank holds 32 of the 256 experts of each of 40 layers and the MTP layer, and everything but experts."""
    experts = 41 * 256 * 3 * 2048 * 512
    whole = architecture_of(recipe("35B_A3B")).parameters(mtp_num_layers=1)
    held = whole - experts + experts / 8
    memory = estimated("35B_A3B")
    assert memory.weights == pytest.approx(2 * held / GIB)
    assert memory.gradients == pytest.approx(4 * held / GIB)
    assert memory.optimizer == 0
    on_gpu = estimated("35B_A3B", optimizer={"cpu_offload": False})
    assert on_gpu.optimizer == pytest.approx(12 * ((whole - experts) / 8 + experts / 8) / GIB)
    copies = estimated("35B_A3B", parallel={"expert": 4}, optimizer={"cpu_offload": False})
    assert copies.optimizer == pytest.approx(on_gpu.optimizer)  # twice the experts on a rank, shared by two
    assert copies.weights == pytest.approx(2 * (whole - experts + experts / 4) / GIB)


def test_a_rollout_holds_the_engine_and_the_weights_that_it_is_sent():
    memory = estimated("9B", gpu_gib=80)
    assert memory.engine == pytest.approx(0.6 * 80)
    assert memory.rollout == pytest.approx(0.6 * 80 + 2 * OF_9B / 2 / GIB + SYNC_GIB + CONTEXT_GIB)
    assert memory.engine_weights == pytest.approx(2 * OF_9B / GIB)
    assert memory.persistent == pytest.approx((2 * OF_9B / 2 + 12 * OF_9B / 2 / 4) / GIB)
    shared = estimated("9B", gpu_gib=80, engine={"gpus_per_engine": 2, "speculation": DRAFTING})
    assert shared.engine_weights == pytest.approx(2 * (OF_9B + MTP_OF_9B) / 2 / GIB)


def test_states_stay_on_the_gpu_only_where_they_fit_beside_the_engine():
    """The engine takes its share and another 20 GiB; the rest must hold weights and Adam's states."""
    needed = (20 + CONTEXT_GIB + (2 * OF_9B / 2 + 12 * OF_9B / 2 / 4) / GIB) / 0.4
    for gpu_gib, stay in ((needed - 0.1, False), (needed + 0.1, True)):
        assert estimated("9B", gpu_gib).fits_beside_engine(gpu_gib) == stay


def test_an_engine_next_to_used_memory_gets_as_much_as_alone():
    engine = recipe("9B").engine
    assert rescaled_engine(engine, 41, 141).mem_fraction_static * (141 - 41) == pytest.approx(0.6 * 141)


@pytest.mark.parametrize(
    "line", MEASURED, ids=[f"{line['model']}-{line['gpus']}-{line['note']['recompute']}" for line in MEASURED]
)
def test_a_rank_takes_what_was_measured_within_7_percent(line):
    """As the README says, of every peak that the benchmarks recorded."""
    note = line["note"]
    parallel = note.get("parallel", {"tensor": 1, "sequence": False})
    model = recipe(
        line["model"],
        hardware={"gpus": line["gpus"]},
        parallel=parallel,
        training={"max_tokens_per_gpu": note["tokens_a_pack"] // parallel["tensor"], "recompute": note["recompute"]},
        sampling={"max_response_tokens": note["response_tokens"]},
        optimizer={"cpu_offload": note["cpu_offload"]},
        engine={"gpus_per_engine": 1, "expert_parallel": 1},
    )
    shape = architecture_of(model)
    shape = replace(shape, num_layers=note.get("layers", shape.num_layers))
    assert estimate(shape, model, 141).training == pytest.approx(note["peak_gib"], rel=0.07)


@pytest.mark.parametrize(
    ("stage", "training", "bytes_each"),
    [
        ("download", {}, 2),
        ("convert", {}, 2),
        ("export", {}, 2),
        ("evaluate", {}, 0),
        ("train", {}, 4 * 14),  # two kept, the best, and the one being written: bf16 weights and Adam's three in fp32
        ("train", {"keep_checkpoints": 5}, 7 * 14),
        ("train", {"rollouts": 20}, 14),
        ("train", {"rollouts": 21}, 2 * 14),
        ("train", {"rollouts": 60}, 3 * 14),
        ("train", {"rollouts": 100, "save_interval": 100}, 14),
    ],
)
def test_disk_is_what_the_weights_and_the_kept_checkpoints_take(stage, training, bytes_each):
    model = recipe("9B", training=training)
    assert disk_gib(model, stage) == pytest.approx(bytes_each * (OF_9B + MTP_OF_9B) / GIB)


@pytest.mark.parametrize(
    ("response", "context", "packs"),
    [
        (16384, 1, 1),  # with a prompt of 2048 just what two GPUs take
        (34816, 1, 2),
        (34816, 2, 1),
        (71680, 2, 2),
    ],
)
def test_a_sequence_longer_than_a_pack_is_counted_whole(response, context, packs):
    def activations(**changes):
        changes["training"] = {"recompute": "full"}
        model = recipe("9B", **changes)
        return estimate(architecture_of(model), model, 141).activations

    needed = activations(sampling={"max_response_tokens": response}, parallel={"context": context})
    assert needed == pytest.approx(packs * activations())


def test_longer_responses_are_recomputed_further():
    overrides = {"sampling": {"max_response_tokens": 32768}}
    models = [configured(changes).models for changes in ({}, overrides)]
    ways = [estimate(architecture_of(model), model, 141).recompute for model in (m["35B_A3B"] for m in models)]
    assert ways == ["none", "full"]


def test_activations_are_kept_only_where_a_fifth_of_the_gpu_stays_free():
    keeping = estimated("9B", training={"recompute": "none"}).training
    for gpu_gib, chosen in ((keeping / 0.79, "none"), (keeping / 0.81, "selective")):
        assert estimated("9B", gpu_gib).recompute == chosen


PARAMETERS = {"0.8B": 0.75e9, "2B": 1.88e9, "4B": 4.2e9, "9B": 9.0e9, "27B": 26.9e9, "35B_A3B": 34.7e9}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_declared_shapes_have_as_many_parameters_as_their_names_say(name):
    assert architecture_of(recipe(name)).parameters() == pytest.approx(PARAMETERS[name], rel=0.02)


@pytest.mark.parametrize(
    ("name", "on_80_gib", "on_141_gib"),
    [
        ("0.8B", "none", "none"),
        ("2B", "none", "none"),
        ("4B", "none", "none"),
        ("9B", "full", "none"),
        ("27B", "full", "selective"),
        ("35B_A3B", "full", "none"),
    ],
)
def test_auto_recomputes_no_more_than_memory_requires(name, on_80_gib, on_141_gib):
    model = recipe(name)
    shape = architecture_of(model)
    assert [estimate(shape, model, memory).recompute for memory in (80, 141)] == [on_80_gib, on_141_gib]
    told = recipe(name, training={"recompute": "full"})
    assert estimate(shape, told, 141).recompute == "full"
    assert estimate(shape, told, 141).activations < estimate(shape, model, 141).activations


@pytest.mark.parametrize(
    ("name", "changes", "on_80_gib", "on_141_gib"),
    [
        ("4B", {}, False, True),
        ("4B", {"hardware": {"gpus": 1}, "parallel": {"tensor": 1, "sequence": False}}, False, False),
        ("27B", {}, True, True),
        ("35B_A3B", {}, False, True),
    ],
)
def test_weights_and_states_stay_on_the_gpu_if_they_fit_beside_the_engine(name, changes, on_80_gib, on_141_gib):
    model = recipe(name, **changes)
    shape = architecture_of(model)
    assert [estimate(shape, model, gib).fits_beside_engine(gib) for gib in (80, 141)] == [on_80_gib, on_141_gib]
    if on_141_gib:
        kept = estimate(shape, model, 141).persistent
        fraction = rescaled_engine(model.engine, kept, 141).mem_fraction_static
        assert fraction * (141 - kept) == pytest.approx(model.engine.mem_fraction_static * 141)
