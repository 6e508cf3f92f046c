"""Only stale steps rerun: after one edit at a time, exactly the jobs that depend on it would run.

Empty files stand in for the results (``--touch`` records the current params for them), so the table shows Snakemake's
own decisions for a model on GPUs and one on CPU, without running either.
"""

import re
import shutil

import pytest

from clones import clone

MODELS = "models=[tiny, 9B]"

# The jobs, by their rules' messages.
DOWNLOAD = "{}: fetch the starting weights"
DATASET = "{}: fetch the problem set"
CONVERT = "{}: convert to Megatron torch_dist"
TRAIN = "{}: train with GRPO"
EXPORT = "{}: export the grpo weights in the Hub's format"
EVALUATE = "{}: evaluate the {} weights on {}"
SUMMARY = {"write the tables", "draw the plots", "write the report"}


def trained(model):
    """Every job downstream of a model's training."""
    dataset = "sums-evaluation" if model == "tiny" else "aime-2024"
    return {TRAIN.format(model), EXPORT.format(model), EVALUATE.format(model, "grpo", dataset)} | SUMMARY


def evaluated(model, dataset):
    return {EVALUATE.format(model, weights, dataset) for weights in ("base", "grpo")} | SUMMARY


EVALUATED = evaluated("tiny", "sums-evaluation") | evaluated("9B", "aime-2024")


@pytest.fixture(scope="module")
def finished(snakemake, tmp_path_factory):
    """A copy of the workflow in which everything is made, as Snakemake sees it."""
    folder = clone(tmp_path_factory.mktemp("workflow"), "envs")
    summary = snakemake("--summary", "--config", MODELS, "--", "all", cwd=folder, check=True).stdout
    for line in summary.splitlines():
        if line.startswith("results/") and "/logs/" not in line:
            output = folder / line.split("\t")[0]
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("{}\n")
    snakemake("--touch", "--forceall", "--config", MODELS, "--", "all", cwd=folder, check=True)
    return folder


@pytest.fixture
def workflow(finished, tmp_path):
    """A fresh copy of the finished workflow to edit; times of files are kept."""
    return shutil.copytree(finished, tmp_path / "workflow", symlinks=True)


def would_run(snakemake, folder, *config, **environment):
    """The messages of the jobs of a dry run."""
    done = snakemake("-n", "--config", MODELS, *config, "--", "all", cwd=folder, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^Job \d+: (.+)$", done.stdout + done.stderr, flags=re.MULTILINE))


def edit(path, old, new):
    content = path.read_text()
    assert old in content, f"{path} no longer holds {old!r}"
    path.write_text(content.replace(old, new, 1))


def test_a_second_run_starts_nothing(snakemake, finished):
    done = snakemake("-n", "--config", MODELS, "--", "all", cwd=finished)
    assert "Nothing to be done" in done.stdout + done.stderr


def test_list_changes_is_empty_if_nothing_changed(snakemake, finished):
    """So that ``-R $(snakemake --list-changes params)`` reruns only what would be rerun anyway."""

    def listed(*config):
        done = snakemake("--list-changes", "params", "--config", MODELS, *config, "--", "all", cwd=finished, check=True)
        return {line for line in done.stdout.splitlines() if line.startswith("results/")}

    assert listed() == set()
    assert "results/9B/grpo/grpo/train.json" in listed("per_model={9B: {optimizer: {learning_rate: 2.0e-6}}}")


OVERRIDES = {
    "a model's learning rate": ("per_model={9B: {optimizer: {learning_rate: 2.0e-6}}}", trained("9B")),
    "everyone's learning rate": ("optimizer={learning_rate: 2.0e-6}", trained("9B") | trained("tiny")),
    "more rollouts": ("per_model={9B: {training: {rollouts: 4000}}}", trained("9B")),
    "the evaluation's temperature": ("evaluation={temperature: 0.6}", EVALUATED),
    "the evaluation's samples": ("evaluation={samples_per_problem: 32}", EVALUATED),
    "the conversion's MTP layers": (
        "per_model={9B: {conversion: {mtp_num_layers: 1}}}",
        {CONVERT.format("9B")} | trained("9B"),
    ),
    "a plot's colour": ("plots={color_trained: '#c92a2a'}", {"draw the plots", "write the report"}),
    "the training set's revision": (
        "datasets={dapo-math-17k: {revision: v2}}",
        {DATASET.format("dapo-math-17k")} | trained("9B"),
    ),
    "the validation and evaluation set's revision": (
        "datasets={aime-2024: {revision: v2}}",
        {DATASET.format("aime-2024")} | trained("9B") | evaluated("9B", "aime-2024"),
    ),
    "the validation's interval alone": ("per_model={9B: {validation: {interval: 0}}}", trained("9B")),
    "the model's revision": (
        "per_model={9B: {source: {revision: v2}}}",
        {DOWNLOAD.format("9B"), CONVERT.format("9B")} | trained("9B") | evaluated("9B", "aime-2024"),
    ),
    "what asks for a box": (
        "datasets={aime-2024: {instruction: Box it.}}",
        {DATASET.format("aime-2024")} | trained("9B") | evaluated("9B", "aime-2024"),
    ),
    "the conversion's processes": ("per_model={9B: {conversion: {processes: 1, launcher: python}}}", set()),
    "the evaluation's GPUs": ("per_model={9B: {evaluation: {gpus: 1}}}", set()),
    "the checkpoint that is scored": (
        "per_model={9B: {export: {checkpoint: best}}}",
        {"9B: export the grpo@best weights in the Hub's format", EVALUATE.format("9B", "grpo@best", "aime-2024")}
        | SUMMARY,
    ),
    "memory that only preflight reads": ("per_model={9B: {hardware: {host_memory_gib: 300}}}", set()),
    "the same value written otherwise": ("per_model={9B: {optimizer: {learning_rate: 0.000001}}}", set()),
}


@pytest.mark.parametrize("what", OVERRIDES)
def test_a_setting_reruns_only_what_reads_it(snakemake, finished, what):
    override, jobs = OVERRIDES[what]
    assert would_run(snakemake, finished, override) == jobs


@pytest.mark.parametrize(
    ("file", "old", "new", "jobs"),
    [
        ("config/config.yaml", "learning_rate: 1.0e-6", "learning_rate: 1.0e-6 # the recipe's", set()),
        ("workflow_scripts/milepost/grpo/losses.py", '"""', '"""Said otherwise. ', set()),
        ("workflow_scripts/milepost/grpo/losses.py", "\nimport torch", "\n# why not\nimport  torch", set()),
        (
            "workflow_scripts/milepost/grpo/losses.py",
            "\nimport torch",
            "\nimport torch\nEDITED = 1",
            trained("9B") | trained("tiny"),
        ),
        (
            "workflow_scripts/milepost/rollout/cpu_engine.py",
            "\nimport torch",
            "\nimport torch\nEDITED = 1",
            trained("tiny") | evaluated("tiny", "sums-evaluation"),
        ),
        ("workflow_scripts/milepost/evaluation/estimators.py", "\nimport", "\nEDITED = 1\nimport", None),
        (
            "workflow_scripts/milepost/reporting/report.py",
            "\nimport",
            "\nEDITED = 1\nimport",
            {"write the report"},
        ),
        ("workflow_scripts/milepost/configuration/schema.py", '"""', '"""Said otherwise. ', set()),
        ("workflow_scripts/make_tiny.py", 'help="name of the model"', 'help="its name"', set()),
        ("workflow_scripts/milepost/hub/client.py", "holds a file named", "has a file called", set()),
        ("workflow_scripts/convert.py", "nothing to convert", "all is there", set()),
        ("workflow_scripts/open_run.py", "a new run, since", "another run, since", set()),
        ("envs/cpu.lock", "torch==", "torch==9.", set()),  # what is installed counts, not what is locked
    ],
    ids=lambda value: value.rsplit("/")[-1] if isinstance(value, str) and value.endswith((".py", ".yaml")) else None,
)
def test_an_edited_file_reruns_what_uses_it(snakemake, workflow, file, old, new, jobs):
    edit(workflow / file, old, new)
    found = would_run(snakemake, workflow)
    if jobs is None:  # all evaluations and the results made from them use the estimators
        assert found >= EVALUATED and not any("fetch" in job or "convert" in job for job in found)
    else:
        assert found == jobs


@pytest.mark.parametrize(
    ("settings", "jobs"),
    [
        ("# optimizer: {learning_rate: 2.0e-6}\n", set()),
        ("optimizer: {learning_rate: 2.0e-6}\n", trained("9B")),  # tiny's own file has another
        ("per_model: {tiny: {optimizer: {learning_rate: 2.0e-4}}}\n", trained("tiny")),
        ("per_model: {tiny: {evaluation: {temperature: 0.6}}}\n", evaluated("tiny", "sums-evaluation")),
        ("hardware: {host_memory_gib: 300}\n", set()),
    ],
)
def test_local_yaml_reruns_only_what_reads_its_settings(snakemake, workflow, settings, jobs):
    (workflow / "config/local.yaml").write_text(settings)
    assert would_run(snakemake, workflow) == jobs


def test_another_version_of_a_package_reruns_what_it_computes(snakemake, finished, tmp_path):
    """Rewards and scores depend on sympy; the version that Python finds first counts."""
    metadata = tmp_path / "sympy-0.1.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sympy\nVersion: 0.1\n")
    found = would_run(snakemake, finished, PYTHONPATH=str(tmp_path))
    assert found == trained("9B") | trained("tiny") | EVALUATED


def test_a_touched_but_unchanged_input_reruns_nothing(snakemake, workflow):
    (workflow / "results/9B/download.json").touch()
    assert would_run(snakemake, workflow) == set()


def test_a_lost_result_is_made_again(snakemake, workflow):
    (workflow / "results/report.html").unlink()
    assert would_run(snakemake, workflow) == {"write the report"}


def test_another_run_name_keeps_the_old_results(snakemake, finished):
    jobs = would_run(snakemake, finished, "run=again")
    assert {TRAIN.format("9B"), EVALUATE.format("9B", "again", "aime-2024")} <= jobs
    assert EVALUATE.format("9B", "base", "aime-2024") not in jobs and CONVERT.format("9B") not in jobs
