"""An evaluation has GPUs, an engine layout and memory of its own, none of which decides its score."""

import json

import pytest

from milepost.common.errors import UserError
from milepost.configuration import provenance
from milepost.configuration.loading import load
from milepost.configuration.memory import asked_gib
from milepost.configuration.preflight import Machine, shortcomings
from milepost.configuration.provenance import Provenance
from milepost.configuration.slurm import Node
from milepost.configuration.slurm import shortcomings as lacking_under_slurm


def configured(root, overrides=None):
    return load(root / "config/config.yaml", root / "config/models", overrides or {})


def model(root, name, **sections):
    return configured(root, {"per_model": {name: sections}}).models[name]


ONE_GPU = Machine((80.0,), host_memory_gib=48, free_disk_gib=100, missing_packages=())


def test_one_gpu_and_a_desktop_s_memory_evaluate_what_a_node_trains(root):
    """9B has 17.1 GiB of weights, and trains on eight GPUs with 192 GiB of host memory."""
    recipe = model(root, "9B", evaluation={"gpus": 1})
    assert shortcomings(recipe, ONE_GPU, {"evaluate"}) == []
    assert shortcomings(recipe, ONE_GPU, {"train", "evaluate"})[0] == "needs 8 GPUs and this machine has 1"
    assert shortcomings(model(root, "9B"), ONE_GPU, {"evaluate"})[:1] == [
        "needs 8 GPUs and this machine has 1: lower evaluation.gpus"
    ]
    (memory,) = shortcomings(model(root, "27B", evaluation={"gpus": 1}), ONE_GPU, {"evaluate"})
    assert memory == "needs 67 GiB of memory to evaluate and there are 48"
    assert shortcomings(model(root, "27B", evaluation={"gpus": 1, "host_memory_gib": 48}), ONE_GPU, {"evaluate"}) == []


def test_what_it_asks_of_a_cluster_is_its_own_too(root):
    recipe, nodes = model(root, "9B", evaluation={"gpus": 1}), [Node(gpus=2, memory_gib=64, cores=64)]
    assert lacking_under_slurm(recipe, {"evaluate"}, "small", nodes) == []
    few = lacking_under_slurm(model(root, "9B", evaluation={"gpus": 4}), {"evaluate"}, "small", nodes)
    assert few[0] == "asks for 4 GPUs (evaluation.gpus), and the nodes of Slurm's partition small have at most 2"
    assert (
        asked_gib(recipe, "train") == 192 and asked_gib(recipe, "evaluate") == 34
    )  # 16, and 17.1 of weights with the MTP layer


@pytest.mark.parametrize(
    ("evaluation", "layout"),
    [
        ({}, (8, 8)),
        ({"gpus": 4}, (4, 4)),
        ({"gpus": 6}, (2, 2)),  # three engines
        ({"gpus": 4, "gpus_per_engine": 1}, (1, 1)),
    ],
)
def test_the_engine_is_laid_out_over_the_evaluation_s_gpus(root, evaluation, layout):
    engine = model(root, "35B_A3B", evaluation=evaluation).evaluation_engine
    assert (engine.gpus_per_engine, engine.expert_parallel) == layout
    assert engine.mem_fraction_static == 0.85


def test_its_engine_s_weights_must_fit_its_own_gpus(root):
    """27B's are 50.1 GiB."""
    small = Machine((48.0,) * 2, host_memory_gib=100, free_disk_gib=100, missing_packages=())
    (fault,) = shortcomings(model(root, "27B", evaluation={"gpus": 2}), small, {"evaluate"})
    assert fault.endswith("gives the engine 40.8 of 48: raise it, or evaluation.gpus_per_engine")
    shared = model(root, "27B", evaluation={"gpus": 2, "gpus_per_engine": 2})
    assert shortcomings(shared, small, {"evaluate"}) == []


@pytest.mark.parametrize(
    ("name", "evaluation", "line"),
    [
        ("9B", {"gpus": 9}, "evaluation.gpus: Input should be less than or equal to 8, not 9"),
        ("9B", {"gpus": 0}, "evaluation.gpus: Input should be greater than 0, not 0"),
        ("9B", {"gpus_per_engine": 3}, "evaluation.gpus_per_engine: 3 does not divide the evaluation's 8 GPUs"),
        ("tiny", {"gpus": 1}, "evaluation.gpus: needs kind: sglang"),
    ],
)
def test_a_layout_that_can_t_be_is_refused_where_it_is_given(root, name, evaluation, line):
    with pytest.raises(UserError, match=rf"^--config: per_model: {name}: {line}"):
        configured(root, {"models": [name], "per_model": {name: {"evaluation": evaluation}}})


@pytest.mark.parametrize(
    ("sections", "stale"),
    [
        ({"evaluation": {"gpus": 1}}, ""),
        ({"evaluation": {"gpus": 8, "gpus_per_engine": 8, "host_memory_gib": 9, "mem_fraction_static": 0.5}}, ""),
        ({"hardware": {"gpus": 4}}, ""),
        ({"engine": {"gpus_per_engine": 2, "max_running_requests": 9, "cuda_graph_batch_sizes": [1]}}, ""),
        ({"evaluation": {"top_k": 20}}, "evaluation.top_k: -1 -> 20"),
        ({"engine": {"server_arguments": {"dtype": "half"}}}, 'engine.server_arguments.dtype: nothing -> "half"'),
    ],
)
def test_no_score_is_stale_for_what_it_would_run_on(root, tmp_path, sections, stale):
    """Of an evaluation that was made before it had settings for that."""
    which = {"model": "9B", "dataset": "aime-2024", "weights": "base"}

    def today(**changes):
        configuration = configured(root, {"results": str(tmp_path), "per_model": {"9B": changes}})
        return Provenance(configuration, root / "workflow_scripts")

    record = today().job("evaluate", **which)
    for name in ("gpus", "gpus_per_engine", "host_memory_gib"):
        del record["config"]["evaluation"][name]
    path = tmp_path / "9B/eval/aime-2024/base.json"
    path.parent.mkdir(parents=True)
    made = {"provenance": record | {"inputs": {}, "upstream": {}}, "files": {}, "root": ".", "facts": {}}
    path.write_text(json.dumps(made | {"kind": "evaluate"}))
    provenance._read.cache_clear()
    assert [text for text in today(**sections).state("evaluate", **which).stale if "made again" not in text] == (
        [stale] if stale else []
    )
    provenance._read.cache_clear()
