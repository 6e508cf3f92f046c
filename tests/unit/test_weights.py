"""Any scored weights have a name, by which tables, plots and report find them: base, runs, and their checkpoints."""

import json
import re

import pytest

from milepost.checkpoints.manifest import write_manifest
from milepost.common.contents import content_of
from milepost.common.errors import UserError
from milepost.common.files import read_json
from milepost.configuration import provenance, runs
from milepost.configuration.compared import check_compared, check_shown
from milepost.configuration.early import check_inputs
from milepost.configuration.loading import load
from milepost.configuration.provenance import Provenance
from milepost.configuration.weights import finished_runs


@pytest.fixture
def configured(root, tmp_path):
    """The configuration of 4B and tiny with their results in a folder of this test."""

    def of(**overrides):
        given = {"models": ["tiny", "4B"], "results": str(tmp_path), **overrides}
        return load(root / "config/config.yaml", root / "config/models", given)

    return of


@pytest.fixture
def finish(tmp_path):
    """Write a run's manifest and checkpoints as a training does, by settings that nobody has any more."""

    def run(model, name, best="checkpoint-000002", checkpoints=(1, 2, 3), content="x", download="d"):
        work = tmp_path / model / "grpo" / name / "0123456789ab"
        for rollout in checkpoints:
            weights = work / f"checkpoint-{rollout:06d}" / "weights"
            weights.mkdir(parents=True, exist_ok=True)
            (weights / "__0_0.distcp").write_text(f"{content}{rollout}")
            write_manifest(weights.parent / "manifest.json", "checkpoint", weights.parent, ["weights/__0_0.distcp"], {})
        last = f"checkpoint-{max(checkpoints):06d}"
        facts = {"weights": f"{last}/weights", "checkpoint": last, "rollouts": max(checkpoints)}
        facts["best"] = best and {"checkpoint": best, "score": 0.5}
        record = {"config": {"optimizer": {"learning_rate": 7}}, "code": "old", "versions": {}, "key": "k"}
        record["inputs"] = {"download": download}
        path = tmp_path / model / "grpo" / name / "train.json"
        provenance._read.cache_clear()
        return write_manifest(path, "train", work, [f"{last}/weights/__0_0.distcp"], record, facts).path

    yield run
    provenance._read.cache_clear()


MISTAKES = {
    "a name without a model": ({"compare": [["base", "grpo"]]}, "compare.0.0: give model/weights: 9B/base, 9B/grpo, "),
    "a checkpoint of the base": ({"compare": [["tiny/base@best", "tiny/grpo"]]}, "compare.0.0: give model/weights"),
    "a checkpoint without its zeros": ({"compare": [["tiny/grpo@40", "tiny/grpo"]]}, "compare.0.0: give model/weights"),
    "three at once": (
        {"compare": [["tiny/base", "tiny/grpo", "tiny/a"]]},
        "compare.0: give pairs, of two weights each: [[9B/base, 9B/grpo]]",
    ),
    "one alone": ({"compare": [["tiny/base"]]}, "compare.0: give pairs"),
    "one pair, not in a list": ({"compare": ["tiny/base", "tiny/grpo"]}, "compare.0: give pairs, of two weights each"),
    "one with itself": ({"compare": [["tiny/base", "tiny/base"]]}, "compare.0: tiny/base: given twice"),
    "an unknown model": (
        {"compare": [["Tiny/base", "tiny/grpo"]]},
        "compare: unknown model 'Tiny', did you mean 'tiny'?",
    ),
    "the base among the runs": ({"runs": ["base"]}, "runs.0: 'base' is the name of the starting weights"),
    "an octal number": (
        {"export": {"checkpoint": 0o40}},
        "export.checkpoint: write checkpoint-000040, or quote the number ('000040')",
    ),
    "no checkpoint": (
        {"export": {"checkpoint": "newest"}},
        "export.checkpoint: give last, best, or a checkpoint by its",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_allowed(configured, what):
    overrides, line = MISTAKES[what]
    with pytest.raises(UserError, match=rf"^--config: {re.escape(line)}"):
        configured(**overrides)


NOT_YET = {
    "a run that is not there": (
        {"compare": [["tiny/base", "tiny/gone@best"]]},
        "compare: no finished run 'gone' (tiny has first): correct the name, or make the run with"
        " `snakemake train_tiny --config run=gone`",
    ),
    "a run that no model has": (
        {"runs": ["gone"]},
        "runs: no finished run 'gone' (tiny has first; 4B has none): correct the name, or make the run with"
        " `snakemake train_tiny --config run=gone`",
    ),
    "models that share no problems": (
        {"compare": [["tiny/base", "4B/base"]]},
        "compare: tiny/base and 4B/base are scored on no common problem set: give both one in evaluation.datasets",
    ),
    "models with other protocols": (
        {"compare": [["tiny/base", "4B/base"]], "per_model": {"4B": {"evaluation": {"datasets": ["sums-evaluation"]}}}},
        "compare: tiny/base and 4B/base can't be compared on sums-evaluation: evaluation.max_response_tokens: 32 ->"
        " 16384: give both the same settings",
    ),
}


@pytest.mark.parametrize("what", NOT_YET)
def test_weights_that_can_not_be_shown_are_refused_only_once_a_target_needs_them(configured, finish, what):
    finish("tiny", "first")
    overrides, line = NOT_YET[what]
    configuration = configured(**overrides)  # as for train_tiny, which may make the very run that is named
    for check in (check_shown, check_compared) if "compare" in overrides else (check_shown,):
        with pytest.raises(UserError, match=rf"^--config: {re.escape(line)}$"):
            check(configuration)


def test_a_comparison_needs_none_of_the_further_runs(configured):
    check_compared(configured(runs=["gone"], compare=[["tiny/base", "tiny/grpo"]]))


def test_runs_stand_beside_the_one_that_is_trained_where_a_model_has_them(configured, finish):
    finish("tiny", "first")
    found = configured(runs=["first", "first@best", "grpo@000040"], export={"checkpoint": "checkpoint-000020"})
    assert found.shown("tiny") == ["base", "grpo@000020", "first", "first@best", "grpo@000040"]
    assert found.shown("4B") == ["base", "grpo@000020", "grpo@000040"]
    assert found.trainings == [("tiny", "grpo"), ("tiny", "first"), ("4B", "grpo")]
    assert [name for *_, name in found.evaluations[:5]] == found.shown("tiny")


def test_compared_weights_are_scored_even_of_models_that_are_not_listed(configured):
    pairs = [["4B/base", "9B/base"], ["4B/grpo", "9B/grpo@best"]]
    found = configured(models=["4B"], compare=pairs)
    assert found.covered == ["4B", "9B"]
    assert found.evaluations == [
        *(("4B", "aime-2024", weights) for weights in ("base", "grpo")),
        *(("9B", "aime-2024", weights) for weights in ("base", "grpo@best")),
    ]
    assert found.trainings == [("4B", "grpo"), ("9B", "grpo")]


def test_a_comparison_alone_needs_no_training_that_it_does_not_name(configured, root, finish):
    """Though tables and report would train the listed models."""
    finish("tiny", "first")

    def needed(*pairs):
        return {*today(configured, root, compare=[*pairs]).of("comparison")["upstream"]}

    scored = {f"evaluate {model} aime-2024 base" for model in ("4B", "9B")}
    assert needed(["4B/base", "9B/base"]) == scored
    of_tiny = {f"evaluate tiny sums-evaluation {weights}" for weights in ("base", "first@best")}
    assert needed(["tiny/base", "tiny/first@best"]) == of_tiny | {"train tiny first"}
    with pytest.raises(UserError, match="give the weights to compare: --config 'compare="):
        check_compared(configured())


def test_what_may_differ_between_two_models_is_no_obstacle(configured):
    """Sets of their own, the engine's layout, and how many samples; but not how those are drawn or graded."""
    of_4b = {"evaluation": {"datasets": ["sums-train", "aime-2024"], "gpus": 1, "samples_per_problem": 32, "seed": 2}}
    of_4b |= {"engine": {"gpus_per_engine": 4}}
    pair = [["4B/base", "9B/base"]]
    found = configured(compare=pair, per_model={"4B": of_4b})
    check_compared(found)
    assert found.shared_sets("4B", "9B") == ["aime-2024"]
    with pytest.raises(UserError, match=r'aime-2024: reward.think_block: "optional" -> "required": give both'):
        check_compared(configured(compare=pair, per_model={"4B": {"reward": {"think_block": "optional"}}}))


# ---- exports of runs ------------------------------------------------------------------------------------------------


def today(configured, root, **overrides):
    provenance._read.cache_clear()
    return Provenance(configured(**overrides), root / "workflow_scripts")


def export(tmp_path, of, weights, checkpoint, inputs):
    """Write the manifest of an export as its job would."""
    folder = tmp_path / "tiny/hf" / weights
    folder.mkdir(parents=True, exist_ok=True)
    record = of.job("export", model="tiny", weights=weights) | {"inputs": inputs}
    write_manifest(folder.with_suffix(".json"), "export", folder, [], record, {"checkpoint": checkpoint})


def test_a_finished_run_is_never_stale_for_what_the_settings_are_now(configured, root, finish, tmp_path):
    trained = finish("tiny", "first")
    now = today(configured, root)
    assert now.training("tiny", "first").fresh and not now.training("tiny", "grpo").fresh
    inputs = {"train": content_of(read_json(trained)), "download": "none"}
    for weights, checkpoint in (("first", "checkpoint-000003"), ("first@best", "checkpoint-000002")):
        export(tmp_path, now, weights, checkpoint, inputs)
    stale = {"download made again"}  # none was made in this test

    def reasons(weights):
        return {*today(configured, root).state("export", model="tiny", weights=weights).stale} - stale

    assert reasons("first") == reasons("first@best") == set()
    finish("tiny", "first", best="checkpoint-000001")
    assert reasons("first") == set() and reasons("first@best") == {"another best checkpoint"}
    finish("tiny", "first", content="y")
    assert reasons("first") == {"another result of train"}


@pytest.mark.parametrize(
    ("weights", "best", "said"),
    [
        ("first", None, None),
        ("first@best", "checkpoint-000002", None),
        ("first@000001", None, None),
        ("first@best", None, "has no best checkpoint, since none was validated: export the last"),
        (
            "first@000009",
            None,
            "has no checkpoint-000009, only checkpoint-000001, checkpoint-000002, checkpoint-000003",
        ),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told_before_the_first_job(configured, root, finish, weights, best, said):
    finish("tiny", "first", best=best)
    jobs = [("export", {"model": "tiny", "weights": weights})]
    if said is None:
        check_inputs(jobs, configured(), today(configured, root))
        return
    with pytest.raises(UserError, match=said):
        check_inputs(jobs, configured(), today(configured, root))


def test_a_run_of_other_starting_weights_is_not_exported_beside_these(configured, root, finish, tmp_path):
    path = finish("tiny", "first", download="of then")
    with pytest.raises(UserError, match="made from other starting weights than the model's source has now"):
        runs.require_same_start(path, json.loads(path.read_text())["provenance"], "of now")
    runs.require_same_start(path, json.loads(path.read_text())["provenance"], "of then")


def test_a_run_is_finished_when_its_manifest_is_there(finish, tmp_path):
    assert finished_runs(tmp_path, "tiny") == []
    finish("tiny", "second")
    finish("tiny", "first")
    (tmp_path / "tiny/grpo/unfinished/0123456789ab").mkdir(parents=True)
    assert finished_runs(tmp_path, "tiny") == ["first", "second"]
