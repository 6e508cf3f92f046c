"""A mistake in the configuration is one line that names file, key, value and what is allowed."""

import json
import math
from typing import get_args

import jsonschema
import pytest
import yaml

from milepost.common.errors import UserError
from milepost.configuration.json_schema import derived
from milepost.configuration.loading import SHARED, load, merge, user_layers
from milepost.configuration.memory import estimate, rescaled_engine
from milepost.configuration.preflight import Machine, check_jobs, shortcomings
from milepost.configuration.provenance import Provenance
from milepost.configuration.schema import Dataset, Model, Plots, Reward, Root, Section, Speculation, WarmUp
from milepost.configuration.shape import architecture_of


def configured(root, overrides=None):
    return load(root / "config/config.yaml", root / "config/models", overrides or {})


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
def test_a_mistake_is_one_line_that_says_where(root, overrides, line):
    with pytest.raises(UserError) as error:
        configured(root, overrides)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--config: ")


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused_wherever_it_is_written(root, tmp_path, number):
    written = tmp_path / "mine.yaml"
    written.write_text(f"optimizer: {{learning_rate: {number}}}")
    in_a_file, on_the_command_line = [written], {"optimizer": {"learning_rate": number}}  # Snakemake leaves it as text
    for settings in (user_layers(in_a_file, {}), user_layers([], on_the_command_line)):
        with pytest.raises(
            UserError, match=rf"({written}|^--config): optimizer\.learning_rate: .* not -?{number[-3:]}"
        ):
            configured(root, settings)


def test_a_mistake_in_a_model_s_own_file_names_that_file(root, tmp_path):
    models = tmp_path / "config/models"
    models.mkdir(parents=True)
    for file in (root / "config/models").glob("*.yaml"):
        (models / file.name).write_text(file.read_text().replace("layers: 64", "layers: sixty"))
    with pytest.raises(UserError, match=r"config/models/27B.yaml: architecture.layers: .* not 'sixty'"):
        load(root / "config/config.yaml", models, {})


def test_what_a_model_lacks_is_for_its_own_file_to_say(root, tmp_path):
    models = tmp_path / "config/models"
    models.mkdir(parents=True)
    (models / "mine.yaml").write_text("hardware: {gpus: 0}\n")
    with pytest.raises(
        UserError, match=r"^config/models/mine.yaml: source: missing: it has no default, so give it here$"
    ):
        load(root / "config/config.yaml", models, {"models": ["mine"]})


def test_a_section_that_stands_twice_in_a_file_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("algorithm: {clip_high: 0.4}\nrun: x\nalgorithm: {use_kl_loss: false}\n")
    with pytest.raises(UserError, match=r"config.yaml: not valid YAML: a second 'algorithm' .*line 3"):
        user_layers([file], {})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None),
        ("false", False),
        ("3", 3),
        ("3.5", 3.5),
        ("#c92a2a", "#c92a2a"),
        ("a: b", "a: b"),
        ("", ""),
        ("9B", "9B"),
    ],
)
def test_what_config_nests_is_typed_as_yaml_types_a_word(text, value):
    (layer,) = user_layers([], {"section": {"key": text, "list": [text]}, "run": text})
    assert layer.content == {"section": {"key": value, "list": [value]}, "run": text}


@pytest.mark.parametrize("name", ["all", "data", "my model", "-x"])
def test_a_model_s_name_is_that_of_no_target_or_folder(root, tmp_path, name):
    for file in ("9B", name):
        (tmp_path / f"{file}.yaml").write_text((root / "config/models/9B.yaml").read_text())
    with pytest.raises(UserError, match=f"{name}.yaml: a model can't be called '{name}'"):
        load(root / "config/config.yaml", tmp_path, {"models": ["9B"]})


def test_a_setting_that_does_not_fit_one_of_the_listed_models_says_which(root):
    with pytest.raises(UserError, match=r"does not divide the 4 .*\(of 35B_A3B; settings of one model alone belong to"):
        configured(root, {"hardware": {"gpus": 4}})


def test_a_home_folder_is_meant_by_a_tilde(root, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert configured(root, {"results": "~/results"}).results == "/home/me/results"


def test_a_fault_of_a_model_that_is_not_listed_waits_until_it_is_asked_for(root):
    configuration = configured(root, {"hardware": {"gpus": 8}, "engine": {"kind": "sglang"}, "models": ["9B"]})
    assert {"4B", "9B", "27B", "35B_A3B", "tiny", "tiny_gpu", "tiny_moe"} <= set(configuration.models)
    configuration = configured(root, {"per_model": {"tiny": {"parallel": {"tensor": 5}}}})
    assert "tiny" not in configuration.models and "tensor 5" in configuration.faults["tiny"]
    with pytest.raises(UserError, match="tensor 5"):
        configured(root, {"models": ["tiny"], "per_model": {"tiny": {"parallel": {"tensor": 5}}}})


def test_routing_is_replayed_only_where_an_engine_hands_out_that_of_a_mixture_of_experts(root):
    assert configured(root, {"per_model": {"35B_A3B": {"engine": {"replay_routing": True}}}}).models["35B_A3B"]
    for name, reason in {"4B": "needs a mixture of experts", "tiny_moe": "needs kind: sglang"}.items():
        with pytest.raises(UserError, match=f"engine.replay_routing: {reason}"):
            configured(root, {"models": [name], "per_model": {name: {"engine": {"replay_routing": True}}}})


def test_without_thinking_an_optional_think_block_is_graded(root):
    settings = {"sampling": {"enable_thinking": False}, "evaluation": {"enable_thinking": False}}
    assert not configured(root, settings | {"reward": {"think_block": "optional"}}).faults


def test_numbers_that_yaml_reads_as_text_are_numbers(root):
    configuration = configured(root, {"optimizer": {"learning_rate": "3e-6"}})
    assert configuration.models["9B"].optimizer.learning_rate == 3e-6


def test_the_user_s_word_beats_the_model_s_file_and_per_model_beats_both(root):
    overrides = {"training": {"rollouts": 7}, "per_model": {"9B": {"training": {"rollouts": 9}}}}
    models = configured(root, overrides).models
    assert (models["tiny"].training.rollouts, models["9B"].training.rollouts) == (7, 9)


@pytest.fixture
def kept(root, tmp_path):
    """``kept(local=..., user=...)``: the configuration with a user's config/local.yaml, and `user_layers` over it."""
    local = tmp_path / "config/local.yaml"
    local.parent.mkdir()

    def make(text, user=()):
        local.write_text(text)
        return load(root / "config/config.yaml", root / "config/models", user, local)

    return make


def test_a_user_s_own_settings_are_read_as_if_config_yaml_said_so(kept):
    configuration = kept("models: [9B, tiny]\ntraining: {rollouts: 7, save_interval: 5}\nhardware: {cores: 12}\n")
    assert configuration.listed == ["9B", "tiny"]
    rollouts = {name: configuration.models[name].training.rollouts for name in ("9B", "tiny")}
    assert rollouts == {"9B": 7, "tiny": 60}  # a model's own file says more of it than what all models share
    assert [configuration.models[name].hardware.cores for name in ("9B", "tiny")] == [12, 2]


def test_the_command_line_beats_a_user_s_own_settings_even_those_for_one_model(kept, tmp_path):
    local = "optimizer: {learning_rate: 1.0}\nper_model: {9B: {training: {rollouts: 5, save_interval: 6}}}\n"
    file = tmp_path / "given.yaml"
    file.write_text("per_model: {9B: {training: {rollouts: 7}}}\nrun: mine\n")
    assert kept(local).models["9B"].training.rollouts == 5
    model = kept(local, user_layers([file], {})).models["9B"]
    assert (model.training.rollouts, model.training.save_interval) == (7, 6)
    for given in ({"training": {"rollouts": 9}}, {"per_model": {"9B": {"training": {"rollouts": 9}}}}):
        assert kept(local, user_layers([file], given)).models["9B"].training.rollouts == 9


@pytest.mark.parametrize("text", ["", "# models: [9B]\n"])
def test_a_file_of_nothing_but_comments_changes_nothing(root, kept, text):
    assert kept(text) == configured(root)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optimizer: {lr: 1}", "config/local.yaml: optimizer.lr: unknown key, did you mean 'learning_rate'?"),
        ("run: base", "config/local.yaml: run: 'base' is the name of the starting weights"),
        ("models: [9b]", "config/local.yaml: models: unknown model '9b', did you mean '9B'?"),
        ("- 9B", "config/local.yaml: a mapping of settings is expected, not list"),
        ("run: [", "config/local.yaml: not valid YAML: "),
        ("models_folder: gone", "config/local.yaml: models_folder: no such folder: gone"),
        (
            "datasets: {mine: {problems: {split: train}, file: x.jsonl}}",
            "config/local.yaml: datasets.mine.problems.rows: missing",
        ),
        ("training: {dataset: mine}", "config/local.yaml: training.dataset: unknown dataset 'mine'"),
        ("hardware: {gpus: 6}", "config/local.yaml: hardware.gpus: parallel: tensor 4 x pipeline 1 x context 1 = 4"),
        (
            "per_model: {9B: {parallel: {tensor: 3}}}",
            "config/local.yaml: per_model: 9B: parallel.tensor: parallel: tensor 3 x pipeline 1 x context 1 = 3",
        ),
    ],
)
@pytest.mark.parametrize("given", [{}, {"plots": {"dpi": 100}, "per_model": {"9B": {"training": {"rollouts": 9}}}}])
def test_a_mistake_in_a_user_s_own_settings_names_their_file(kept, text, line, given):
    with pytest.raises(UserError) as error:
        kept(text, user_layers([], given))
    assert str(error.value).startswith(line)


def test_a_folder_of_the_user_s_holds_further_models(root, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    recipe = (root / "config/models/9B.yaml").read_text()
    (mine / "mine.yaml").write_text(recipe.replace("Qwen3.5-9B", "Qwen3.5-mine"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("mine", "../" + tmp_path.name + "/mine", "~/mine", str(mine)):
        configuration = configured(root, {"models_folder": folder, "models": ["mine", "9B"]})
        assert configuration.models["mine"].source.repo == "Qwen/Qwen3.5-mine"
        assert configuration.models["9B"].source.repo == "Qwen/Qwen3.5-9B"


@pytest.mark.parametrize("folder", ["mine", "../{}/mine", "~/mine"])
@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("mine", "source: {repo: a/b}\ntrainings: {}\n", "mine.yaml: trainings: unknown key, did you mean 'training'?"),
        ("mine", "hardware: {gpus: 0}\n", "mine.yaml: source: missing"),
        ("mine", "source: {\n", "mine.yaml: not valid YAML: "),
        ("all", "source: {repo: a/b}\n", "all.yaml: a model can't be called 'all'"),
        ("9B", "source: {repo: a/b}\n", "9B.yaml: config/models/9B.yaml defines the model '9B' already: give this"),
    ],
)
def test_a_mistake_in_a_model_of_the_user_s_names_the_file_as_they_know_it(
    root, tmp_path, monkeypatch, folder, name, text, line
):
    folder = folder.format(tmp_path.name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        configured(root, {"models_folder": folder, "models": list({"4B", name})})
    assert str(error.value).startswith(f"{folder}/{line}")


def test_what_is_missing_is_for_the_file_to_say_that_began_the_section(root, tmp_path):
    shared = tmp_path / "config/config.yaml"
    shared.parent.mkdir()
    shared.write_text((root / "config/config.yaml").read_text().replace("  dataset: dapo-math-17k\n", ""))
    with pytest.raises(
        UserError, match=r"^config/config.yaml: training.dataset: missing: it has no default, so give it here$"
    ):
        load(shared, root / "config/models", {"training": {"rollouts": 5}})
    with pytest.raises(UserError, match=r"^--config: per_model: tiny: architecture.layers: missing: it has no default"):
        configured(root, {"per_model": {"tiny": {"architecture": {"hidden": 64}}}, "models": ["tiny"]})


def test_naming_another_place_replaces_the_first(root):
    overrides = {"datasets": {"aime-2024": {"folder": "here"}}, "per_model": {"9B": {"source": {"folder": "there"}}}}
    overrides["per_model"]["tiny"] = {"source": {"tiny": {"warm_up": {"steps": 7}}}}
    configuration = configured(root, overrides)
    assert configuration.models["tiny"].source.tiny.warm_up.steps == 7
    for source in (configuration.datasets["aime-2024"], configuration.models["9B"].source):
        assert source.folder and source.repo is None
    assert configuration.datasets["aime-2024"].rows == 30


def test_merging_changes_neither_side():
    under, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert merge(under, over) == {"a": {"b": 3, "c": 2}}
    assert (under, over) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})


def test_schemas_and_key_tables_are_up_to_date():
    stale = [str(path) for path, content in derived().items() if path.read_text(encoding="utf-8") != content]
    assert not stale, "run `make schema`"


def every_section():
    """Each section of the configuration once, with those in lists, mappings and alternatives."""
    waiting, seen = [Root, Model], []
    while waiting:
        section = waiting.pop()
        if section not in seen:
            seen.append(section)
            waiting += [part for field in section.model_fields.values() for part in sections_in(field.annotation)]
    return seen


def sections_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for option in get_args(annotation) for section in sections_in(option)]


def test_a_key_that_config_yaml_lacks_is_missed_there_and_not_made_up(root, tmp_path):
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


SHIPPED = ("4B", "9B", "27B", "35B_A3B", "tiny", "tiny_gpu", "tiny_moe")


def test_every_figure_stands_in_one_place(root):
    """A value in config.yaml is no default of the schema, too, and a model's file repeats neither of them."""
    shared = yaml.safe_load((root / "config/config.yaml").read_text())
    fields, twice = {**Root.model_fields, **Model.model_fields}, []
    for name in (*SHARED, "plots"):
        (section,) = sections_in(fields[name].annotation)
        if section is not Reward:
            twice += [f"{name}.{key}" for key in shared.get(name, {}) if not section.model_fields[key].is_required()]
    for model in SHIPPED:
        own = yaml.safe_load((root / f"config/models/{model}.yaml").read_text())
        for name in SHARED:
            (section,) = sections_in(fields[name].annotation)
            for key, value in own.get(name, {}).items():
                if value == shared.get(name, {}).get(key, section.model_fields[key].get_default()):
                    twice.append(f"{model}: {name}.{key}")
    assert not twice


def test_every_key_and_every_section_says_what_it_means():
    assert {WarmUp, Speculation, Dataset, Plots} <= set(every_section())
    silent = [section.__name__ for section in every_section() if not section.__doc__]
    for section in every_section():
        silent += [f"{section.__name__}.{key}" for key, field in section.model_fields.items() if not field.description]
    assert not silent


def test_the_shipped_files_satisfy_the_schemas_that_editors_use(root):
    shared = json.loads((root / "config/schema.json").read_text())
    jsonschema.validate(yaml.safe_load((root / "config/config.yaml").read_text()), shared)
    model = json.loads((root / "config/models/schema.json").read_text())
    for file in (root / "config/models").glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(file.read_text()), model)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"optimizer": {"lr": 1}}, shared)


PARAMETERS = {"4B": 4.2e9, "9B": 9.0e9, "27B": 26.9e9, "35B_A3B": 34.7e9}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_declared_shapes_have_the_parameters_of_their_names(root, name):
    model = configured(root).models[name]
    assert architecture_of(model).parameters() == pytest.approx(PARAMETERS[name], rel=0.02)
    needed = estimate(architecture_of(model), model, 141)
    assert 5 < needed.training < 141 and needed.weights < needed.gradients


def test_the_memory_estimate_is_within_a_tenth_of_every_measured_peak(root):
    files = [root / "benchmarks/results" / f"{name}.jsonl" for name in ("gpu_training", "gpu_recipes")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    peaks = [line for line in lines if line["name"] == "memory_estimate_error"]
    assert len(peaks) > 5
    for name, gpus, note in ((line["model"], line["gpus"], line["note"]) for line in peaks):
        parallel = note.get("parallel", {"tensor": 1, "expert": 1})
        changes = {
            "hardware": {"gpus": gpus},
            "parallel": parallel,
            "engine": {"gpus_per_engine": 1, "expert_parallel": 1},
            "conversion": {"processes": 1},
            "optimizer": {"cpu_offload": note["cpu_offload"]},
            "training": {
                "max_tokens_per_gpu": note["tokens_a_pack"] // parallel["tensor"],
                "recompute": note["recompute"],
            },
            "sampling": {"max_response_tokens": note["response_tokens"]},
        }
        if "layers" in note:
            changes["architecture"] = {"layers": note["layers"]}
        model = configured(root, {"per_model": {name: changes}}).models[name]
        assert estimate(architecture_of(model), model, 141).training == pytest.approx(note["peak_gib"], rel=0.1), note


@pytest.mark.parametrize(
    ("name", "on_80_gib", "on_141_gib"),
    [
        ("4B", "none", "none"),
        ("9B", "full", "none"),
        ("27B", "full", "selective"),
        ("35B_A3B", "full", "none"),
    ],
)
def test_no_more_is_recomputed_than_memory_asks_for(root, name, on_80_gib, on_141_gib):
    model = configured(root).models[name]
    shape = architecture_of(model)
    assert [estimate(shape, model, memory).recompute for memory in (80, 141)] == [on_80_gib, on_141_gib]
    told = configured(root, {"per_model": {name: {"training": {"recompute": "full"}}}}).models[name]
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
def test_weights_and_states_stay_where_the_engine_leaves_room(root, name, changes, on_80_gib, on_141_gib):
    model = configured(root, {"per_model": {name: changes}}).models[name]
    shape = architecture_of(model)
    assert [estimate(shape, model, gib).lasts_beside_engine(gib) for gib in (80, 141)] == [on_80_gib, on_141_gib]
    if on_141_gib:
        kept = estimate(shape, model, 141).lasting
        fraction = rescaled_engine(model.engine, kept, 141).mem_fraction_static
        assert fraction * (141 - kept) == pytest.approx(model.engine.mem_fraction_static * 141)


def test_preflight_says_everything_that_is_missing_at_once(root):
    model = configured(root).models["27B"]
    laptop = Machine((), 16, 100, missing_packages=("sglang",), has_compiler=False, has_cuda_toolkit=False)
    assert shortcomings(model, laptop) == [
        "needs 8 GPUs and this machine has none",
        "needs 448 GiB of memory and there are 16",
        "needs sglang, not installed: run `make setup` on the GPU machine",
        "needs a C compiler, gcc or clang: install one, or name yours in the variable CC",
        "needs a CUDA toolkit (nvcc), with which SGLang builds kernels: install one, or set CUDA_HOME",
    ]
    node = Machine(gpus=(141.0,) * 8, host_memory_gib=1500, free_disk_gib=4000, missing_packages=())
    assert shortcomings(model, node) == []
    small = Machine(gpus=(24.0,) * 8, host_memory_gib=1500, free_disk_gib=4000, missing_packages=())
    advice = "lower training.max_tokens_per_gpu or engine.mem_fraction_static, or raise parallel.tensor"
    assert advice in shortcomings(model, small)[0]


def test_preflight_looks_for_the_cuda_toolkit_where_it_would_be_taken_from(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert not Machine.here("results").has_cuda_toolkit
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch(mode=0o755)
    assert Machine.here("results").has_cuda_toolkit
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    assert Machine.here("results").has_cuda_toolkit


def test_preflight_refuses_or_warns(root, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    jobs = [("train", {"model": "9B"})]

    def check(overrides=None):
        configuration = configured(root, overrides)
        check_jobs(jobs, configuration, Provenance(configuration, root / "workflow_scripts"))

    with pytest.raises(UserError, match=r"9B needs 8 GPUs .*preflight: warn. in the configuration starts it anyway"):
        check()
    check({"preflight": "warn"})
    assert capsys.readouterr().err.startswith("warning: 9B needs 8 GPUs")
