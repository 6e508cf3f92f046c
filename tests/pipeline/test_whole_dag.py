"""A real run of the whole DAG with a tiny Qwen3.5: warm-up, conversion, GRPO, export, evaluation, tables, report."""

import json
import re
import shutil

import pandas
import pytest
import yaml

from clones import clone
from listeners import listeners

SETTINGS = {
    "models": ["tiny"],
    "datasets": {
        "sums-train": {"problems": {"split": "train", "seed": 0, "rows": 64}},
        "sums-evaluation": {"problems": {"split": "evaluation", "seed": 0, "rows": 8}},
    },
    "per_model": {
        "tiny": {
            "source": {"tiny": {"warm_up": {"steps": 20, "batch_size": 16}}},
            "training": {
                "prompts_per_rollout": 4,
                "samples_per_prompt": 4,
                "global_batch": 16,
                "rollouts": 2,
                "save_interval": 1,
            },
            # After so short a warm-up no response is right; the entropy bonus still gives every response a gradient.
            "algorithm": {"entropy_coefficient": 0.01},
            "validation": {"interval": 1, "samples_per_problem": 1},
            "evaluation": {"samples_per_problem": 2, "pass_at": [1, 2]},
        }
    },
}


@pytest.fixture(scope="module")
def work(tmp_path_factory, snakefile, snakemake):
    """A folder of results, made once; `run` runs targets there under settings that a test may change."""
    folder = tmp_path_factory.mktemp("whole")

    class Work:
        def __init__(self):
            self.folder = folder
            self.results = folder / "results"
            self.snakefile = snakefile

        def run(self, *targets, **changes):
            settings = json.loads(json.dumps(SETTINGS))
            for key, value in changes.items():
                node = settings
                *path, last = key.split("__")
                for part in path:
                    node = node.setdefault(part, {})
                node[last] = value
            file = folder / "settings.yaml"
            file.write_text(yaml.safe_dump(settings))
            done = snakemake(
                "--cores", "2", "--directory", str(folder), "--configfile", str(file), "--", *targets,
                snakefile=self.snakefile,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        def samples(self, name):
            """The sampled responses of an evaluation."""
            return [json.loads(line) for line in (self.results / name).read_text().split("\n")[:-1]]

        def manifest(self, name):
            return json.loads((self.results / name).read_text())

    made = Work()
    with listeners() as made.listeners:
        made.first = made.run("all")
    return made


def ran(output):
    return sorted(set(re.findall(r"^Job \d+: (.+)$", output, flags=re.MULTILINE)))


@pytest.mark.slow
def test_everything_is_made(work):
    for name in ("tables/scores.csv", "tables/scores.md", "report.html"):
        assert (work.results / name).stat().st_size > 100, name
    assert list((work.results / "plots").glob("*.png"))
    scores = pandas.read_csv(work.results / "tables/scores.csv")
    assert set(scores["weights"]) == {"base", "grpo"}
    metrics = [json.loads(line) for line in next(work.results.glob("tiny/grpo/grpo/*/metrics.jsonl")).open()]
    assert [row["rollout"] for row in metrics if "loss" in row] == [1, 2]
    assert len(work.samples("tiny/eval/sums-evaluation/base.jsonl")) == 16


@pytest.mark.slow
def test_nothing_listens_beyond_loopback_meanwhile(work):
    assert work.listeners.loopback  # gloo's; sockets on other interfaces would have been seen too
    assert not work.listeners.open, work.listeners.open


@pytest.mark.slow
def test_a_second_run_starts_nothing(work):
    assert "Nothing to be done" in work.run("all")


@pytest.mark.slow
def test_a_finished_run_is_scored_by_its_name_whatever_the_settings_are_now(work):
    target = "results/tiny/eval/sums-evaluation/grpo.json"
    (work.results.parent / target).unlink()
    now = {"run": "another", "per_model__tiny__optimizer": {"learning_rate": 1.0e-3}}
    assert ran(work.run(target, **now)) == ["tiny: evaluate the grpo weights on sums-evaluation"]


MINE = """
source: {folder: FOLDER}
hardware: {gpus: 0}
engine: {kind: cpu}
evaluation: {datasets: [sums-evaluation], samples_per_problem: 2, max_response_tokens: 32, pass_at: [1, 2]}
"""


@pytest.mark.slow
def test_a_model_from_elsewhere_and_the_best_checkpoint_stand_in_one_report(work):
    """The model is tiny's own starting weights in a folder, so that its score is the same to the last sample."""
    base = work.results / "tiny" / work.manifest("tiny/download.json")["root"]
    (work.folder / "models").mkdir()
    (work.folder / "models/mine.yaml").write_text(MINE.replace("FOLDER", str(base)))
    own = {"models_folder": str(work.folder / "models")}
    assert ran(work.run("evaluate_mine", **own)) == [
        "mine: evaluate the base weights on sums-evaluation",
        "mine: fetch the starting weights",
    ]
    pair = {"compare": [["tiny/base", "mine/base"]]}
    assert ran(work.run("compare", **pair, **own)) == ["compare the scores"]
    assert "0.0 points" in (work.results / "tables/comparison.md").read_text()
    made = ran(work.run("report", runs=["grpo@best"], **pair, **own))
    assert not any("train with GRPO" in job or job.startswith("mine: ") for job in made)
    table = pandas.read_csv(work.results / "tables/differences.csv").set_index(["first", "second"])
    assert set(table.index) == {
        *(("tiny/base", f"tiny/{weights}") for weights in ("grpo", "grpo@best")),
        ("tiny/base", "mine/base"),
    }
    assert table.loc[("tiny/base", "mine/base"), "difference"] == 0
    mine, tiny = (work.samples(f"{model}/eval/sums-evaluation/base.jsonl") for model in ("mine", "tiny"))
    assert [sample["response"] for sample in mine] == [sample["response"] for sample in tiny]
    best = work.manifest("tiny/grpo/grpo/train.json")["facts"]["best"]["checkpoint"]
    assert work.manifest("tiny/hf/grpo@best.json")["facts"]["checkpoint"] == best
    for name in ("logs/tables.log", "tables/scores.md", "report.html"):
        assert "the best of 2 validations" in (work.results / name).read_text(), name


@pytest.mark.slow
def test_a_result_made_again_with_equal_content_reruns_nothing_else(work, tmp_path):
    """Another version of the pipeline: a text is other, then the code of the first stage."""
    work.run("all")  # the tests before may have left a report on other runs
    clone(tmp_path)
    script = tmp_path / "workflow_scripts/make_tiny.py"
    trained = work.results / "tiny/hf/grpo/model.safetensors.index.json"
    before, original = trained.stat().st_mtime_ns, work.snakefile
    try:
        work.snakefile = tmp_path / "Snakefile"
        script.write_text(script.read_text().replace('help="what to write, last"', 'help="the manifest"'))
        assert "Nothing to be done" in work.run("all")
        script.write_text(script.read_text() + "\nEDITED = 1\n")
        again = work.run("all")
        assert "tiny: fetch the starting weights (its code)" in ran(again)
        for words in ("nothing to convert", "all 2 rollouts are done: nothing to train", "nothing to export"):
            assert words in again
        assert trained.stat().st_mtime_ns == before
        assert "Nothing to be done" in work.run("all")
    finally:
        work.snakefile = original
    work.run("all")


@pytest.mark.slow
def test_the_export_loads_in_transformers_and_keeps_what_was_not_trained(work):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    before = work.manifest("tiny/download.json")
    base, trained = work.results / "tiny" / before["root"], work.results / "tiny/hf/grpo"
    assert sorted(path.name for path in base.iterdir()) == sorted(path.name for path in trained.iterdir())
    old = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    new = {name: tensor for file in trained.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {name: (t.shape, t.dtype) for name, t in old.items()} == {
        name: (t.shape, t.dtype) for name, t in new.items()
    }
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and not any("visual" in name for name in changed)
    # In the type that it trained in, not rounded to the bf16 of real models.
    assert not any(new[name].bfloat16().float().equal(new[name]) for name in changed if new[name].numel() > 100)
    AutoModelForImageTextToText.from_pretrained(trained)


@pytest.mark.slow
def test_more_rollouts_continue_the_run_and_a_new_learning_rate_starts_another(work):
    longer = work.run(
        "train_tiny", per_model__tiny__training=SETTINGS["per_model"]["tiny"]["training"] | {"rollouts": 3}
    )
    assert ran(longer) == ["tiny: train with GRPO (training.rollouts: 2 -> 3; the run goes on after 2 rollouts)"]
    (folder,) = work.results.glob("tiny/grpo/grpo/*/")
    assert [json.loads(line)["rollout"] for line in (folder / "metrics.jsonl").open() if "loss" in line] == [1, 2, 3]
    other = work.run("train_tiny", per_model__tiny__optimizer={"learning_rate": 1.0e-3})
    changed = "optimizer.learning_rate: 0.0001 -> 0.001, training.rollouts: 3 -> 2"
    assert ran(other) == [f"tiny: train with GRPO ({changed}; a new run begins, and the old one stays)"]
    assert f"a new run, since its settings, code or data differ from those of {folder.name}" in other
    assert len(list(work.results.glob("tiny/grpo/grpo/*/"))) == 2
    assert folder.exists()


@pytest.mark.slow
def test_the_real_aime_file_runs_through_eval_tiny_by_configuration_alone(work, root):
    data = work.folder / "aime"
    data.mkdir()
    shutil.copy(root / "tests/data/aime-2024.jsonl", data)
    work.run(
        "eval_tiny",
        datasets__aime={"folder": str(data), "file": "aime-2024.jsonl", "rows": 30, "unique_prompts": True},
        per_model__tiny__training__rollouts=3,  # as many as the run has by now
        per_model__tiny__evaluation={
            "datasets": ["aime"],
            "samples_per_problem": 2,
            "pass_at": [1, 2],
            "max_response_tokens": 8,
        },
    )
    samples = work.samples("tiny/eval/aime/grpo.jsonl")
    assert len(samples) == 60 and len({sample["problem"] for sample in samples}) == 30
    graded = work.manifest("tiny/eval/aime/grpo.json")["facts"]["per_problem"]
    assert {problem["label"] for problem in graded} >= {"025", "073"}
