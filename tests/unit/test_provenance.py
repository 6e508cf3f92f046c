"""A result is stale if and only if something that it depends on changed."""

import shutil
from itertools import count

import pytest

import train
from milepost.configuration import stages
from milepost.configuration.code import code_digest
from milepost.configuration.loading import load
from milepost.configuration.provenance import Provenance
from milepost.configuration.schema import Evaluation
from milepost.grpo.settings import Settings
from milepost.grpo.validation import validation_settings


@pytest.mark.parametrize(("name", "depends"), [("4B", True), ("tiny", False)])
def test_a_download_depends_on_the_shape_that_it_must_have(root, name, depends):
    def download(**changes):
        overrides = {"per_model": {name: changes}}
        configuration = load(root / "config/config.yaml", root / "config/models", overrides)
        return Provenance(configuration, root / "workflow_scripts").of("download", model=name)

    shape = load(root / "config/config.yaml", root / "config/models", {}).models["4B"].architecture.model_dump()
    before, after = download(architecture=shape), download(architecture=shape | {"layers": 36})
    assert (before != after) == depends
    if depends:
        assert after["config"]["architecture"]["layers"] == 36


def test_a_local_data_set_whose_content_changes_is_another(root, tmp_path):
    def key():
        overrides = {"datasets": {"mine": {"folder": str(tmp_path), "file": "mine.jsonl"}}}
        configuration = load(root / "config/config.yaml", root / "config/models", overrides)
        stages._content.cache_clear()  # as in a separate run
        return Provenance(configuration, root / "workflow_scripts").key("dataset", name="mine")

    keys = [key()]
    for content in ("one", "two"):
        (tmp_path / "mine.jsonl").write_text(content)
        keys.append(key())
    assert len(set(keys)) == 3 and key() == keys[-1]


def test_a_local_data_set_is_another_where_one_of_its_files_or_its_filter_changes(root, tmp_path):
    def key(**settings):
        dataset = {"folder": str(tmp_path), "file": "part-*.csv", "filter": {"level": [4]}, **settings}
        configuration = load(root / "config/config.yaml", root / "config/models", {"datasets": {"mine": dataset}})
        stages._content.cache_clear()  # as in a separate run
        return Provenance(configuration, root / "workflow_scripts").key("dataset", name="mine")

    (tmp_path / "part-1.csv").write_text("1")
    (tmp_path / "part-2.csv").write_text("2")
    first = key()
    (tmp_path / "other.csv").write_text("3")
    assert key() == first
    different = [key(filter={"level": [4, 5]}), key(rows="0:5"), key(choices={"right": "a", "wrong": ["b"]})]
    (tmp_path / "part-2.csv").write_text("two")
    different.append(key())
    (tmp_path / "part-3.csv").write_text("3")
    different.append(key())
    assert len({first, *different}) == 6


def test_a_scored_set_must_be_valid_before_any_training(recipes):
    """Only trainings tolerate bad rows."""
    assert recipes().job("dataset", name="aime-2024")["every_row"]
    assert not recipes().job("dataset", name="dapo-math-17k")["every_row"]
    validated = {"validation": {"interval": 20, "dataset": "dapo-math-17k"}}
    assert recipes(**validated).job("dataset", name="dapo-math-17k")["every_row"]


def test_an_evaluation_does_not_depend_on_engine_settings_that_only_training_uses(root):
    def key(**engine):
        overrides = {"per_model": {"35B_A3B": {"engine": engine}}}
        configuration = load(root / "config/config.yaml", root / "config/models", overrides)
        provenance = Provenance(configuration, root / "workflow_scripts")
        return provenance.key("evaluate", model="35B_A3B", dataset="aime-2024", weights="base")

    assert key() == key(mem_fraction_static=0.4, check_weights=True, replay_routing=True)
    assert key() != key(speculation=None)


@pytest.fixture
def digest(tmp_path):
    """The digest of the script main.py, which starts with ``imports``, after an edit of another file."""
    numbers = count()

    def of(imports, edited=None, addition="EDITED = 1\n", script="main.py"):
        root = tmp_path / str(next(numbers))  # digests are cached for the life of a process
        files = dict.fromkeys(("package/__init__.py", "package/inner/__init__.py", "package/inner/deep.py"), "X = 1\n")
        files |= dict.fromkeys(
            ("package/module.py", "package/unused.py", "other.py", "milepost/configuration/schema.py"), "X = 1\n"
        )
        files |= {script: f"{imports}\n", "package/through.py": "from other import X\n"}
        if edited:
            files[edited] += addition
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)
        return code_digest(root, script)

    return of


@pytest.mark.parametrize(
    ("imports", "module"),
    [
        ("import other", "other.py"),
        ("import os, other as renamed", "other.py"),
        ("import package.module", "package/module.py"),
        ("import package.module as module", "package/module.py"),
        ("import package.module", "package/__init__.py"),  # which runs before the module
        ("from package import module", "package/module.py"),
        ("from package import module as renamed", "package/module.py"),
        ("from package import unused, module", "package/module.py"),
        ("from package.module import X", "package/module.py"),
        ("from package.module import *", "package/module.py"),
        ("from package.inner import deep", "package/inner/deep.py"),
        ("from package.inner import deep", "package/__init__.py"),
        ("from package import inner", "package/inner/__init__.py"),
        ("from package import through", "other.py"),
        ("def later():\n    from package import module", "package/module.py"),
        ("class Late:\n    if True:\n        import package.module", "package/module.py"),
        ("try:\n    import other\nexcept ImportError:\n    pass", "other.py"),
    ],
)
def test_what_a_script_imports_by_whatever_form_is_its_code(digest, imports, module):
    assert digest(imports) == digest(imports)
    assert digest(imports) != digest(imports, edited=module)


@pytest.mark.parametrize(
    ("script", "imports", "module"),
    [
        ("package/run.py", "from . import module", "package/module.py"),
        ("package/run.py", "from .module import X", "package/module.py"),
        ("package/run.py", "from .inner import deep", "package/inner/deep.py"),
        ("package/inner/run.py", "from .. import module", "package/module.py"),
        ("package/inner/run.py", "from ..module import X", "package/module.py"),
    ],
)
def test_relative_imports_are_code_too(digest, script, imports, module):
    assert digest(imports, script=script) != digest(imports, edited=module, script=script)


@pytest.mark.parametrize(
    ("edited", "addition"),
    [
        ("package/unused.py", "EDITED = 1\n"),
        ("milepost/configuration/schema.py", "EDITED = 1\n"),  # what it decides is in the slice
        ("package/module.py", "# a comment\n\n"),
        ("other.py", "EDITED = 1\n"),
    ],
)
def test_what_a_script_does_not_use_is_not_its_code(digest, edited, addition):
    imports = "from milepost.configuration import schema\nfrom package import module"
    assert digest(imports) == digest(imports, edited=edited, addition=addition)


@pytest.fixture
def recipes(root):
    """The recipes' provenance under settings for 9B; ``datasets`` are everyone's."""

    def of(datasets=None, **sections):
        overrides = {"per_model": {"9B": sections}, "datasets": datasets or {}}
        return Provenance(
            load(root / "config/config.yaml", root / "config/models", overrides), root / "workflow_scripts"
        )

    return of


def test_jobs_are_given_whole_sections(recipes):
    """Entry scripts read them with no defaults to fall back on."""
    jobs = recipes()
    training = Settings.model_validate(jobs.job("train", model="35B_A3B")["config"])
    assert training.engine.speculation.steps == 2 and training.validation.dataset == "aime-2024"
    assert validation_settings(training).datasets == ["aime-2024"]
    given = jobs.job("evaluate", model="35B_A3B", dataset="aime-2024", weights="base")["config"]["evaluation"]
    assert Evaluation.model_validate(given).datasets == ["aime-2024"]


def test_a_training_depends_on_its_validation_set(recipes):
    was, revised = recipes(), recipes(datasets={"aime-2024": {"revision": "v2"}})
    assert set(was.of("train", model="9B")["upstream"]) == {"download", "convert", "dataset", "validation"}
    assert was.key("train", model="9B") != revised.key("train", model="9B")
    never = {"validation": {"interval": 0}}
    assert "validation" not in recipes(**never).of("train", model="9B")["upstream"]
    assert recipes(**never).key("train", model="9B") == recipes(
        datasets={"aime-2024": {"revision": "v2"}}, **never
    ).key("train", model="9B")


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({"evaluation": {"temperature": 0.5}}, {"base", "grpo"}),
        ({"reward": {"max_seconds": 1.0}}, {"base", "grpo"}),
        ({"source": {"revision": "v2"}}, {"base", "grpo"}),
        ({"optimizer": {"learning_rate": 1e-5}}, {"grpo"}),
        ({"hardware": {"host_memory_gib": 99}}, set()),
        ({"datasets": {"aime-2024": {"revision": "v2"}}, "validation": {"interval": 0}}, {"base", "grpo"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_base_scores_depend_on_the_download_and_trained_ones_on_the_training(recipes, changes, stale):
    unchanged = {"validation": {"interval": 0}} if "datasets" in changes else {}
    found = {
        weights
        for weights in ("base", "grpo")
        if recipes(**unchanged).key("evaluate", model="9B", dataset="aime-2024", weights=weights)
        != recipes(**changes).key("evaluate", model="9B", dataset="aime-2024", weights=weights)
    }
    assert found == stale


@pytest.mark.parametrize(
    ("was", "becomes", "counts"),
    [
        ("def f():\n    raise ValueError(f'too {1}')", "def f():\n    raise ValueError(f'much too {2}')", False),
        ("def f():\n    raise ValueError('too much')", "def f():\n    raise TypeError('too much')", True),
        ("f = UserError('a' + 'b')", "f = UserError('c')", False),
        ("parser.add_argument('--a', help='this')", "parser.add_argument('--a', help='that')", False),
        ("parser.add_argument('--a', help='this')", "parser.add_argument('--b', help='this')", True),
        ("parser.add_argument('--a', default='this')", "parser.add_argument('--a', default='that')", True),
        ("print('this', file=sys.stderr)", "print(f'that {x}', file=sys.stderr)", False),
        ("print('this', file=answers)", "print('that', file=answers)", True),  # which another process reads
        ("print('this')", "print('that')", True),
        ("sys.exit('this')", "sys.exit('that')", False),
        ("logger.warning('this %s', x)", "logger.warning('that %s', x)", False),
        ("assert x, 'this'", "assert x, 'that'", False),
        ("assert x, 'this'", "assert y, 'this'", True),
        ("tqdm(desc='this', total=3)", "tqdm(desc='that', total=3)", False),
        ("f('this')", "f('that')", True),
        ("X = 'this'", "X = 'that'", True),
        ("def f():\n    'this'\n    return 1", "def f():\n    'that'\n    return 1", False),
        ("def f():\n    return 1  # this", "def f():\n\n    return (1)", False),
        ("def f():\n    return 1", "def f():\n    return 2", True),
    ],
)
def test_messages_are_not_code_and_everything_else_is(digest, was, becomes, counts):
    assert (digest(was) != digest(becomes)) == counts


@pytest.mark.parametrize("module", ["errors", "files", "interrupts", "loopback", "labels"])
def test_how_a_job_ends_or_waits_is_no_code_of_its_result(root, tmp_path, module):
    scripts = shutil.copytree(root / "workflow_scripts", tmp_path / "scripts")
    before = code_digest(scripts, "train.py")
    edited = shutil.copytree(scripts, tmp_path / "edited")
    with (edited / "milepost/common" / f"{module}.py").open("a") as file:
        file.write("\nEDITED = 1\n")
    assert (code_digest(edited, "train.py") != before) == (module == "labels")


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"seed": 2}},
        {"parallel": {"sequence": False}},
        {"algorithm": {"clip": 0.3}},
        {"optimizer": {"weight_decay": 0.2}},
        {"mtp": {"loss_scale": 0.3}},
        {"sampling": {"temperature": 0.9}},
        {"engine": {"server_arguments": {"dtype": "half"}}},
        {"experts": {"aux_loss_coefficient": 0.1}},
        {"reward": {"max_seconds": 1.0}},
        {"hardware": {"gpus": 4}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_section_that_a_training_reads_identifies_it(recipes, changes):
    assert recipes(**changes).key("train", model="9B") != recipes().key("train", model="9B")


def test_a_training_s_record_holds_every_section_that_the_script_reads(recipes):
    """Those of a function's code and of another reward for the validation stand there if there are such."""
    required = {name for name, field in train.Settings.model_fields.items() if field.is_required()}
    assert required == set(recipes().of("train", model="9B")["config"])


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        (
            "milepost/rollout/sglang_engine.py",
            {"train", "evaluate"},
        ),  # which scripts import by the engine's name in the settings
        ("milepost/rollout/cpu_engine.py", set()),
        ("milepost/grpo/losses.py", {"train"}),
        ("evaluate_model.py", {"evaluate"}),
    ],
)
def test_an_edit_makes_what_runs_that_code_stale(root, tmp_path, file, stale):
    configuration = load(root / "config/config.yaml", root / "config/models", {})
    edited = shutil.copytree(root / "workflow_scripts", tmp_path / "scripts")
    (edited / file).write_text((edited / file).read_text() + "\nEDITED = 1\n")
    was, now = (Provenance(configuration, scripts) for scripts in (root / "workflow_scripts", edited))
    results = {"train": {}, "evaluate": {"dataset": "aime-2024", "weights": "base"}}
    keys = [{stage: of.key(stage, model="9B", **which) for stage, which in results.items()} for of in (was, now)]
    found = {stage for stage in results if keys[0][stage] != keys[1][stage]}
    assert found == stale
