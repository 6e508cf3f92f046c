"""The configuration is the recipes: every figure, model by model."""

import pytest

from milepost.common.files import write_json
from milepost.configuration.loading import load
from milepost.configuration.shape import require_shape
from milepost.tiny.tokenizer import train_tokenizer

DENSE = {
    "hardware.gpus": 8,
    "parallel.pipeline": 1,
    "parallel.context": 1,
    "parallel.expert": 1,
    "parallel.expert_tensor": 1,
    "parallel.sequence": True,
    "engine.kind": "sglang",
    "engine.gpus_per_engine": 1,
    "engine.cuda_graph_batch_sizes": None,
    "engine.max_running_requests": None,
    "engine.speculation": None,
    "mtp.train": False,
    "conversion.mtp_num_layers": 0,
    "conversion.launcher": "python",
    "architecture.head_dim": 256,
    "architecture.linear_head_dim": 128,
    "architecture.linear_key_heads": 16,
    "architecture.experts": None,
}

PER_MODEL = {
    "4B": DENSE
    | {
        "source.repo": "Qwen/Qwen3.5-4B",
        "parallel.tensor": 2,
        "training.max_tokens_per_gpu": 9216,
        "engine.mem_fraction_static": 0.7,
        "optimizer.cpu_offload": False,
        "architecture.layers": 32,
        "architecture.hidden": 2560,
        "architecture.ffn": 9216,
        "architecture.attention_heads": 16,
        "architecture.key_value_groups": 4,
        "architecture.linear_value_heads": 32,
        "architecture.tied_embeddings": True,
    },
    "9B": DENSE
    | {
        "source.repo": "Qwen/Qwen3.5-9B",
        "parallel.tensor": 2,
        "training.max_tokens_per_gpu": 9216,
        "engine.mem_fraction_static": 0.6,
        "optimizer.cpu_offload": False,
        "architecture.layers": 32,
        "architecture.hidden": 4096,
        "architecture.ffn": 12288,
        "architecture.attention_heads": 16,
        "architecture.key_value_groups": 4,
        "architecture.linear_value_heads": 32,
        "architecture.tied_embeddings": False,
    },
    "27B": DENSE
    | {
        "source.repo": "Qwen/Qwen3.5-27B",
        "parallel.tensor": 4,
        "training.max_tokens_per_gpu": 8192,
        "engine.mem_fraction_static": 0.5,
        "optimizer.cpu_offload": True,
        "architecture.layers": 64,
        "architecture.hidden": 5120,
        "architecture.ffn": 17408,
        "architecture.attention_heads": 24,
        "architecture.key_value_groups": 4,
        "architecture.linear_value_heads": 48,
        "architecture.tied_embeddings": False,
    },
    "35B_A3B": {
        "source.repo": "Qwen/Qwen3.5-35B-A3B",
        "hardware.gpus": 8,
        "parallel.tensor": 1,
        "parallel.pipeline": 1,
        "parallel.context": 1,
        "parallel.expert": 8,
        "parallel.expert_tensor": 1,
        "parallel.sequence": True,
        "training.max_tokens_per_gpu": 8192,
        "engine.kind": "sglang",
        "engine.mem_fraction_static": 0.7,
        "engine.gpus_per_engine": 8,
        "engine.expert_parallel": 8,
        "engine.cuda_graph_batch_sizes": [1, 2, 4, *range(8, 257, 8)],
        "engine.max_running_requests": 512,
        "engine.speculation.algorithm": "EAGLE",
        "engine.speculation.steps": 2,
        "engine.speculation.top_k": 1,
        "engine.speculation.draft_tokens": 3,
        "conversion.mtp_num_layers": 1,
        "conversion.launcher": "torchrun",
        "conversion.processes": 8,
        "mtp.train": True,
        "mtp.loss_scale": 0.2,
        "optimizer.cpu_offload": True,
        "experts.dispatcher": "flex",
        "experts.deepep": False,
        "experts.aux_loss_coefficient": 0.0,
        "architecture.layers": 40,
        "architecture.hidden": 2048,
        "architecture.ffn": 512,
        "architecture.attention_heads": 16,
        "architecture.key_value_groups": 2,
        "architecture.head_dim": 256,
        "architecture.linear_key_heads": 16,
        "architecture.linear_value_heads": 32,
        "architecture.linear_head_dim": 128,
        "architecture.tied_embeddings": False,
        "architecture.experts": 256,
        "architecture.experts_per_token": 8,
        "architecture.shared_expert_ffn": 512,
    },
}

SHARED = {
    "architecture.vocabulary": 248320,
    "algorithm.advantage": "grpo",
    "algorithm.std_epsilon": 1e-6,
    "algorithm.clip": 0.2,
    "algorithm.clip_high": 0.28,
    "algorithm.use_kl_loss": True,
    "algorithm.kl_coefficient": 0.0,
    "algorithm.kl_type": "low_var_kl",
    "algorithm.entropy_coefficient": 0.0,
    "algorithm.loss_aggregation": "mean_of_response_means",
    "optimizer.learning_rate": 1e-6,
    "optimizer.warm_up_steps": 0,
    "optimizer.weight_decay": 0.1,
    "optimizer.betas": (0.9, 0.98),
    "training.dataset": "dapo-math-17k",
    "training.prompts_per_rollout": 32,
    "training.samples_per_prompt": 8,
    "training.global_batch": 256,
    "training.rollouts": 3000,
    "training.recompute": "auto",  # a choice, says the table: what is fastest within memory
    "training.save_interval": 20,
    "sampling.max_response_tokens": 8192,
    "sampling.temperature": 1.0,
    "reward.think_block": "required",
    "validation.interval": 20,
    "validation.dataset": "aime-2024",
    "validation.samples_per_problem": 16,
    "validation.max_response_tokens": 16384,
    "validation.top_p": 1.0,
    "evaluation.datasets": ["aime-2024"],
    "evaluation.samples_per_problem": 16,
    "evaluation.max_response_tokens": 16384,
    "evaluation.top_p": 1.0,
}


@pytest.fixture(scope="module")
def configuration(root):
    return load(root / "config/config.yaml", root / "config/models", {})


@pytest.mark.parametrize("name", PER_MODEL)
def test_every_figure_of_the_recipe_is_configured(configuration, name):
    wrong = {}
    for key, expected in (SHARED | PER_MODEL[name]).items():
        value = configuration.models[name]
        for part in key.split("."):
            value = getattr(value, part)
        if value != expected:
            wrong[key] = (value, expected)
    assert not wrong


def test_the_data_sets_are_the_recipe_s(configuration):
    training, evaluation = configuration.datasets["dapo-math-17k"], configuration.datasets["aime-2024"]
    assert (training.repo, training.file) == ("zhuzilin/dapo-math-17k", "dapo-math-17k.jsonl")
    assert (evaluation.repo, evaluation.file, evaluation.rows) == ("zhuzilin/aime-2024", "aime-2024.jsonl", 30)
    assert (
        (training.prompt_key, training.label_key)
        == (evaluation.prompt_key, evaluation.label_key)
        == ("prompt", "label")
    )
    assert "\\boxed{}" in evaluation.instruction and training.instruction is None
    assert configuration.listed == ["4B", "9B", "27B", "35B_A3B"]


@pytest.mark.parametrize("name", PER_MODEL)
def test_a_random_checkpoint_of_the_benchmarks_has_the_declared_shape(configuration, root, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(root / "benchmarks")
    from random_checkpoint import true_config

    shape = configuration.models[name].architecture
    write_json(tmp_path / "config.json", true_config(shape, train_tokenizer()))
    require_shape(tmp_path, shape)
