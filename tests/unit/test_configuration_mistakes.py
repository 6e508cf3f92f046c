"""A mistake in the configuration is one line that names file, key, value and what is allowed."""

import math

import pytest
import yaml

from milepost.common.errors import UserError
from milepost.configuration.layers import user_layers
from milepost.configuration.loading import load
from settings import configured


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"optimizer": {"lr": 1}}, "optimizer.lr: unknown key, did you mean 'learning_rate'?"),
        ({"optimiser": {}}, "optimiser: unknown key, did you mean 'optimizer'?"),
        ({"training": {"rollout": 3}}, "training.rollout: unknown key, did you mean 'rollouts'?"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate: Input should be a valid number"),
        ({"optimizer": {"learning_rate": math.inf}}, "optimizer.learning_rate: Input should be a finite number, not"),
        ({"optimizer": {"betas": [0.9, math.nan]}}, "optimizer.betas.1: Input should be a finite number, not nan"),
        ({"reward": {"max_seconds": "inf"}}, "reward.max_seconds: Input should be a finite number, not 'inf'"),
        ({"algorithm": {"entropy_coefficient": "1e999"}}, "algorithm.entropy_coefficient: Input should be a finite"),
        (
            {"engine": {"server_arguments": {"schedule_conservativeness": math.nan}}},
            "engine.server_arguments.schedule_conservativeness: Input should be a finite number, not nan",
        ),
        (
            {"engine": {"server_arguments": {"host": "0.0.0.0", "random_seed": 1}}},
            "engine.server_arguments: host: where the servers listen and which GPUs they take is decided by the",
        ),
        (
            {"engine": {"server_arguments": {"dp_size": 2}}},
            "engine.server_arguments: dp_size: there is one engine for every gpus_per_engine GPUs already",
        ),
        (
            {"training": {"recompute": "some"}},
            "training.recompute: Input should be 'auto', 'full', 'selective' or 'none', not 'some'",
        ),
        (
            {"per_model": {"35B_A3B": {"architecture": {"experts_per_token": 1}}}},
            "architecture.experts_per_token: Input should be greater than or equal to 2, not 1",
        ),
        (
            {"per_model": {"35B_A3B": {"architecture": {"shared_expert_ffn": None}}}},
            "architecture: experts, experts_per_token and shared_expert_ffn belong together",
        ),
        ({"training": {"rollouts": 0}}, "training.rollouts: Input should be greater than 0, not 0"),
        ({"engine": {"kind": "vllm"}}, "engine.kind: Input should be 'sglang' or 'cpu', not 'vllm'"),
        ({"rollouts": 3}, "rollouts: unknown key, did you mean training.rollouts?"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature: 0 gives every sample of a prompt the same answer"),
        (
            {"algorithm": {"loss": "gspo", "loss_aggregation": "token_mean"}},
            "algorithm.loss: algorithm.loss_aggregation: token_mean does not fit loss: gspo, whose ratio is a mean",
        ),
        (
            {"algorithm": {"loss": "cispo", "dual_clip": 3.0}},
            "algorithm.loss: algorithm.dual_clip: bounds the ratio of loss: ppo; cispo has a bound of its own",
        ),
        ({"algorithm": {"dual_clip": 0.9}}, "algorithm.dual_clip: Input should be greater than 1, not 0.9"),
        (
            {"algorithm": {"constant_length": 8192}},
            "algorithm.constant_length: is for loss_aggregation: constant_length; mean_of_response_means ignores it",
        ),
        (
            {"algorithm": {"correction": "sequence"}},
            "algorithm.correction: Input should be 'none', 'token_truncate', 'token_mask', 'sequence_truncate' or",
        ),
        (
            {"algorithm": {"correction": "token_truncate", "old_log_probs": "engine"}},
            "algorithm.correction: token_truncate counts the ratio between trainer and engine twice",
        ),
        (
            {"algorithm": {"correction": "token_mask"}, "sampling": {"top_p": 0.9}},
            "algorithm.correction: token_mask compares the engine's probabilities with the trainer's, to which"
            " sampling.top_p 0.9 and top_k -1 do not apply: use top_p 1 and top_k -1",
        ),
        (
            {"algorithm": {"old_log_probs": "engine"}, "sampling": {"top_k": 20}},
            "algorithm.old_log_probs: engine compares the engine's probabilities with the trainer's, to which",
        ),
        (
            {"algorithm": {"correction_bounds": [0.5, 2.0]}},
            "algorithm.correction_bounds: bound the weights of a correction, and there is none: set algorithm.correct",
        ),
        (
            {"algorithm": {"correction": "token_mask", "correction_bounds": [2.0, 0.5]}},
            "algorithm.correction_bounds: the least weight has to be below the largest",
        ),
        (
            {"algorithm": {"overlong": {"mode": "penalty"}}},
            "algorithm.overlong: mode: penalty needs a buffer, the tokens before the cap over which it grows",
        ),
        ({"algorithm": {"overlong": {"buffer": 9}}}, "algorithm.overlong: buffer is for mode: penalty, and mode is"),
        (
            {"algorithm": {"overlong": {"mode": "penalty", "buffer": 9000}}},
            "algorithm.overlong.buffer: 9000 is more than sampling.max_response_tokens 8192",
        ),
        ({"training": {"rollouts": None}}, "training.rollouts: Input should be a valid integer, not None"),
        ({"training": 3}, "training: a section of settings is expected, not 3"),
        ({"models": "9B"}, "models: a list is expected, not '9B'"),
        ({"optimizer": {"betas": 0.9}}, "optimizer.betas: a list is expected, not 0.9"),
        ({"results": "of {mine}"}, "results: braces mean something else to Snakemake"),
        ({"models": []}, "models: List should have at least 1 item"),
        ({"per_model": {"9b": {}}}, "per_model: unknown model '9b', did you mean '9B'?"),
        ({"models": ["9b"]}, "unknown model '9b', did you mean '9B'?"),
        ({"training": {"dataset": "dapo"}}, "unknown dataset 'dapo', did you mean 'dapo-math-17k'?"),
        ({"training": {"global_batch": 100}}, "global_batch 100 does not divide prompts_per_rollout 32"),
        (
            {"per_model": {"9B": {"parallel": {"tensor": 3}}}},
            "context 1 = 3 does not divide the 8",
        ),
        (
            {"per_model": {"9B": {"parallel": {"tensor": 6}, "hardware": {"gpus": 6}}}},
            "parallel.tensor: tensor 6 x context 1 does not divide the 16 attention heads",
        ),
        ({"per_model": {"9B": {"parallel": {"expert": 2}}}}, "parallel.expert: 2 needs a mixture of experts"),
        (
            {"per_model": {"9B": {"parallel": {"pipeline": 2, "tensor": 2}}}},
            "parallel.pipeline: training takes 1",
        ),
        ({"per_model": {"35B_A3B": {"parallel": {"expert": 3}}}}, "parallel.expert: expert 3"),
        ({"per_model": {"9B": {"engine": {"gpus_per_engine": 3}}}}, "3 does not divide hardware.gpus 8"),
        ({"per_model": {"9B": {"engine": {"kind": "cpu"}}}}, "'cpu' does not fit hardware.gpus 8"),
        ({"per_model": {"9B": {"mtp": {"train": True}}}}, "mtp.train: needs conversion.mtp_num_layers: 1"),
        ({"per_model": {"9B": {"conversion": {"processes": 2}}}}, "launcher python runs one process"),
        ({"evaluation": {"pass_at": [32]}}, "pass_at 32 needs at least as many samples_per_problem"),
        ({"evaluation": {"datasets": []}}, "evaluation.datasets: List should have at least 1 item"),
        ({"evaluation": {"pass_at": []}}, "evaluation.pass_at: List should have at least 1 item"),
        (
            {"sampling": {"enable_thinking": False}},
            "sampling.enable_thinking: false closes the think block in the prompt, so no response holds the </think>"
            " that reward.think_block: required asks for",
        ),
        (
            {"evaluation": {"enable_thinking": False}, "reward": {"think_block": "required"}},
            "evaluation.enable_thinking: false closes the think block",
        ),
        ({"sampling": {"top_k": 0}}, "sampling.top_k: 0 leaves no token"),
        ({"evaluation": {"presence_penalty": 3}}, "evaluation.presence_penalty: "),
        ({"reward": {"max_seconds": 0}}, "reward.max_seconds: "),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "optimizer.betas"),
        ({"run": "base"}, "'base' is the name of the starting weights"),
        ({"datasets": {"mine": {"file": "a.jsonl"}}}, "give exactly one of repo, folder, problems"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(overrides, line):
    with pytest.raises(UserError) as error:
        configured(overrides)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--config: ")


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
def test_an_infinite_or_nan_setting_is_refused(tmp_path, number):
    written = tmp_path / "mine.yaml"
    written.write_text(f"optimizer: {{learning_rate: {number}}}")
    in_a_file, on_the_command_line = [written], {"optimizer": {"learning_rate": number}}  # Snakemake leaves it as text
    for settings in (user_layers(in_a_file, {}), user_layers([], on_the_command_line)):
        with pytest.raises(
            UserError, match=rf"({written}|^--config): optimizer\.learning_rate: .* not -?{number[-3:]}"
        ):
            configured(settings)


def test_a_mistake_in_a_model_s_own_file_names_that_file(root, tmp_path):
    models = tmp_path / "config/models"
    models.mkdir(parents=True)
    for file in (root / "config/models").glob("*.yaml"):
        (models / file.name).write_text(file.read_text().replace("layers: 64", "layers: sixty"))
    with pytest.raises(UserError, match=r"config/models/27B.yaml: architecture.layers: .* not 'sixty'"):
        load(root / "config/config.yaml", models, {})


def test_a_key_that_a_model_lacks_is_reported_for_its_own_file(root, tmp_path):
    models = tmp_path / "config/models"
    models.mkdir(parents=True)
    (models / "mine.yaml").write_text("hardware: {gpus: 0}\n")
    with pytest.raises(
        UserError, match=r"^config/models/mine.yaml: source: missing: it has no default, so give it here$"
    ):
        load(root / "config/config.yaml", models, {"models": ["mine"]})


def test_a_missing_key_is_reported_for_the_file_that_has_its_section(root, tmp_path):
    shared = tmp_path / "config/config.yaml"
    shared.parent.mkdir()
    shared.write_text((root / "config/config.yaml").read_text().replace("  dataset: dapo-math-17k\n", ""))
    with pytest.raises(
        UserError, match=r"^config/config.yaml: training.dataset: missing: it has no default, so give it here$"
    ):
        load(shared, root / "config/models", {"training": {"rollouts": 5}})
    with pytest.raises(UserError, match=r"^--config: per_model: tiny: architecture.layers: missing: it has no default"):
        configured({"per_model": {"tiny": {"architecture": {"hidden": 64}}}, "models": ["tiny"]})


def test_a_key_that_config_yaml_lacks_has_no_hidden_default(root, tmp_path):
    shared = tmp_path / "config/config.yaml"
    shared.parent.mkdir()
    whole = yaml.safe_load((root / "config/config.yaml").read_text())
    for section, key in (("optimizer", "learning_rate"), ("evaluation", "seed"), ("engine", "kind"), ("plots", "dpi")):
        shared.write_text(yaml.safe_dump(whole | {section: {k: v for k, v in whole[section].items() if k != key}}))
        with pytest.raises(
            UserError, match=f"^config/config.yaml: {section}.{key}: missing: it has no default, so give"
        ):
            load(shared, root / "config/models", {"models": ["9B"]})
        shared.write_text(yaml.safe_dump({k: v for k, v in whole.items() if k != section}))
        with pytest.raises(UserError, match=rf"^config/config.yaml: {section}(\.\w+)?: missing"):
            load(shared, root / "config/models", {"models": ["9B"]})


def test_a_duplicate_section_in_a_file_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("algorithm: {clip_high: 0.4}\nrun: x\nalgorithm: {use_kl_loss: false}\n")
    with pytest.raises(UserError, match=r"config.yaml: not valid YAML: a second 'algorithm' .*line 3"):
        user_layers([file], {})


@pytest.mark.parametrize("name", ["all", "data", "my model", "-x"])
def test_a_model_can_not_have_the_name_of_a_target_or_folder(root, tmp_path, name):
    for file in ("9B", name):
        (tmp_path / f"{file}.yaml").write_text((root / "config/models/9B.yaml").read_text())
    with pytest.raises(UserError, match=f"{name}.yaml: a model can't be called '{name}'"):
        load(root / "config/config.yaml", tmp_path, {"models": ["9B"]})


def test_a_setting_that_does_not_fit_one_of_the_listed_models_says_which():
    with pytest.raises(UserError, match=r"does not divide the 4 .*\(of 35B_A3B; settings of one model alone belong to"):
        configured({"hardware": {"gpus": 4}})


def test_an_error_in_an_unlisted_model_is_raised_only_when_the_model_is_listed():
    configuration = configured({"hardware": {"gpus": 8}, "engine": {"kind": "sglang"}, "models": ["9B"]})
    assert {"0.8B", "2B", "4B", "9B", "27B", "35B_A3B", "tiny", "tiny_gpu", "tiny_moe"} <= set(configuration.models)
    configuration = configured({"per_model": {"tiny": {"parallel": {"tensor": 5}}}})
    assert "tiny" not in configuration.models and "tensor 5" in configuration.faults["tiny"]
    with pytest.raises(UserError, match="tensor 5"):
        configured({"models": ["tiny"], "per_model": {"tiny": {"parallel": {"tensor": 5}}}})


def test_replay_routing_needs_sglang_and_a_mixture_of_experts():
    assert configured({"per_model": {"35B_A3B": {"engine": {"replay_routing": True}}}}).models["35B_A3B"]
    for name, reason in {"4B": "needs a mixture of experts", "tiny_moe": "needs kind: sglang"}.items():
        with pytest.raises(UserError, match=f"engine.replay_routing: {reason}"):
            configured({"models": [name], "per_model": {name: {"engine": {"replay_routing": True}}}})


def test_thinking_can_be_off_if_the_think_block_is_optional():
    settings = {"sampling": {"enable_thinking": False}, "evaluation": {"enable_thinking": False}}
    assert not configured(settings | {"reward": {"think_block": "optional"}}).faults
