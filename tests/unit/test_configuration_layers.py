"""Layers of settings: later ones override earlier ones, and a mistake names the layer that holds it."""

import pytest

from milepost.common.errors import UserError
from milepost.configuration.layers import merge, user_layers
from milepost.configuration.loading import load
from settings import configured


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
def test_nested_values_of_config_are_typed_as_in_yaml(text, value):
    (layer,) = user_layers([], {"section": {"key": text, "list": [text]}, "run": text})
    assert layer.content == {"section": {"key": value, "list": [value]}, "run": text}


def test_numbers_that_yaml_reads_as_text_are_numbers():
    configuration = configured({"optimizer": {"learning_rate": "3e-6"}})
    assert configuration.models["9B"].optimizer.learning_rate == 3e-6


def test_a_tilde_is_expanded_to_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert configured({"results": "~/results"}).results == "/home/me/results"


def test_merging_changes_neither_side():
    under, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}
    assert merge(under, over) == {"a": {"b": 3, "c": 2}}
    assert (under, over) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})


def test_naming_another_place_replaces_the_first():
    overrides = {"datasets": {"aime-2024": {"folder": "here"}}, "per_model": {"9B": {"source": {"folder": "there"}}}}
    overrides["per_model"]["tiny"] = {"source": {"tiny": {"warm_up": {"steps": 7}}}}
    configuration = configured(overrides)
    assert configuration.models["tiny"].source.tiny.warm_up.steps == 7
    for source in (configuration.datasets["aime-2024"], configuration.models["9B"].source):
        assert source.folder and source.repo is None
    assert configuration.datasets["aime-2024"].rows == 30


def test_config_overrides_a_model_s_file_and_per_model_overrides_both():
    overrides = {"training": {"rollouts": 7}, "per_model": {"9B": {"training": {"rollouts": 9}}}}
    models = configured(overrides).models
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


def test_local_yaml_overrides_config_yaml_but_not_a_model_s_file(kept):
    configuration = kept("models: [9B, tiny]\ntraining: {rollouts: 7, save_interval: 5}\nhardware: {cores: 12}\n")
    assert configuration.listed == ["9B", "tiny"]
    rollouts = {name: configuration.models[name].training.rollouts for name in ("9B", "tiny")}
    assert rollouts == {"9B": 7, "tiny": 60}  # a model's own file says more of it than what all models share
    assert [configuration.models[name].hardware.cores for name in ("9B", "tiny")] == [12, 2]


def test_the_command_line_overrides_local_yaml_and_its_per_model(kept, tmp_path):
    local = "optimizer: {learning_rate: 1.0}\nper_model: {9B: {training: {rollouts: 5, save_interval: 6}}}\n"
    file = tmp_path / "given.yaml"
    file.write_text("per_model: {9B: {training: {rollouts: 7}}}\nrun: mine\n")
    assert kept(local).models["9B"].training.rollouts == 5
    model = kept(local, user_layers([file], {})).models["9B"]
    assert (model.training.rollouts, model.training.save_interval) == (7, 6)
    for given in ({"training": {"rollouts": 9}}, {"per_model": {"9B": {"training": {"rollouts": 9}}}}):
        assert kept(local, user_layers([file], given)).models["9B"].training.rollouts == 9


@pytest.mark.parametrize("text", ["", "# models: [9B]\n"])
def test_a_file_of_nothing_but_comments_changes_nothing(kept, text):
    assert kept(text) == configured()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optimizer: {lr: 1}", "config/local.yaml: optimizer.lr: unknown key, did you mean 'learning_rate'?"),
        ("run: base", "config/local.yaml: run: 'base' is the name of the starting weights"),
        ("models: [9b]", "config/local.yaml: models: unknown model '9b', did you mean '9B'?"),
        ("- 9B", "config/local.yaml: a mapping of settings is expected, not list"),
        ("run: [", "config/local.yaml: not valid YAML: "),
        ("models_folder: gone", "config/local.yaml: models_folder: no such folder: gone"),
        ("datasets: {mine: {folder: ., rows: 5:3}}", "config/local.yaml: datasets.mine.rows: a number of rows is"),
        (
            "datasets: {mine: {problems: {split: train}, file: a.jsonl}}",
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
def test_a_mistake_in_local_yaml_names_that_file(kept, text, line, given):
    with pytest.raises(UserError) as error:
        kept(text, user_layers([], given))
    assert str(error.value).startswith(line)


def test_models_folder_adds_models(root, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    recipe = (root / "config/models/9B.yaml").read_text()
    (mine / "mine.yaml").write_text(recipe.replace("Qwen3.5-9B", "Qwen3.5-mine"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("mine", "../" + tmp_path.name + "/mine", "~/mine", str(mine)):
        configuration = configured({"models_folder": folder, "models": ["mine", "9B"]})
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
def test_a_mistake_in_a_user_s_model_names_the_file_as_models_folder_does(
    tmp_path, monkeypatch, folder, name, text, line
):
    folder = folder.format(tmp_path.name)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / f"{name}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        configured({"models_folder": folder, "models": list({"4B", name})})
    assert str(error.value).startswith(f"{folder}/{line}")


@pytest.mark.parametrize(
    ("over", "named"),
    [
        ({"split": "train"}, (None, "main", "train")),
        ({"file": "mine.csv"}, ("mine.csv", None, None)),
        ({"rows": "10:50"}, (None, "main", "test")),
    ],
)
def test_a_data_set_s_files_are_named_by_what_was_given_last(kept, over, named):
    dataset = kept("", user_layers([], {"datasets": {"gsm8k": over}})).datasets["gsm8k"]
    assert (dataset.file, dataset.subset, dataset.split) == named
    assert dataset.row_slice == ((10, 50) if "rows" in over else (0, None))


def test_a_split_takes_the_place_of_a_file(kept):
    dataset = kept("datasets: {aime-2025: {split: test}}").datasets["aime-2025"]
    assert (dataset.file, dataset.split, dataset.row_count) == (None, "test", 30)
