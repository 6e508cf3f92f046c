"""Staleness, and how a dry run explains it: settings, code, versions and content count; history does not."""

import json
import shutil

import pytest

from milepost.checkpoints.manifest import same_result, write_manifest
from milepost.common.contents import content_of
from milepost.common.errors import UserError
from milepost.common.files import read_json, write_json
from milepost.common.jobs import read_job
from milepost.configuration import provenance, runs, staleness
from milepost.configuration.loading import load
from milepost.configuration.provenance import Provenance, State

STAGES = {
    "dataset": [{"name": "sums-train"}, {"name": "sums-evaluation"}],
    "download": [{"model": "tiny"}],
    "convert": [{"model": "tiny"}],
    "train": [{"model": "tiny"}],
    "export": [{"model": "tiny"}],
    "evaluate": [
        {"model": "tiny", "dataset": "sums-evaluation", "weights": "base"},
        {"model": "tiny", "dataset": "sums-evaluation", "weights": "grpo"},
    ],
    "plots": [{}],
}
NAMES = {"convert": "__0_0.distcp", "train": "checkpoint-000060/weights/__0_0.distcp"}


class Workflow:
    """The pipeline's results for tiny, as manifests and small files, and their current states."""

    def __init__(self, root, folder, monkeypatch):
        self.root, self.folder, self.monkeypatch = root, folder, monkeypatch
        self.code, self.versions, self.settings = "c1", {"torch": "2.0"}, {}

    def today(self) -> Provenance:
        """Results as a new run of Snakemake sees them."""
        overrides = {"models": ["tiny"], "results": str(self.folder), **self.settings}
        configuration = load(self.root / "config/config.yaml", self.root / "config/models", overrides)
        self.monkeypatch.setattr(provenance, "code_digest", lambda scripts, *names: f"{self.code} {names[0]}")
        self.monkeypatch.setattr(provenance.versions, "versions", lambda packages: self.versions)
        provenance._read.cache_clear()
        return Provenance(configuration, self.root / "workflow_scripts")

    def make(self, stage, content="x", **which):
        """Write a stage's manifest as its job would."""
        today = self.today()
        path = today._manifest(stage, which)
        write_json(self.folder / "job.json", today.job(stage, **which))
        job = read_job(self.folder / "job.json")
        if stage == "train":
            folder = runs.open_run(path.parent, job)
            (folder / "checkpoint-000060").mkdir(exist_ok=True)
        else:
            folder = path.parent / f"{path.stem}-files"
        file = folder / NAMES.get(stage, "file")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        facts = {"rows": 1} if stage == "dataset" else {}
        kind = "download" if stage == "dataset" else stage
        write_manifest(path, kind, folder, [str(file.relative_to(folder))], job, facts)

    def states(self) -> dict[str, State]:
        today = self.today()
        return {
            " ".join([stage, which.get("name") or which.get("weights", "")]).strip(): today.state(stage, **which)
            for stage, results in STAGES.items()
            for which in results
        }

    def stale(self) -> dict[str, str]:
        """The results that would be remade, and why."""
        return {name: "; ".join(state.stale) for name, state in self.states().items() if not state.fresh}

    def keys(self) -> dict[str, str]:
        today = self.today()
        return {f"{stage} {which}": today.key(stage, **which) for stage, results in STAGES.items() for which in results}


@pytest.fixture
def workflow(root, tmp_path, monkeypatch):
    """A workflow with all results."""
    made = Workflow(root, tmp_path, monkeypatch)
    for stage, results in STAGES.items():
        for which in results:
            made.make(stage, **which)
    return made


AFTER_TRAINING = {"export", "evaluate grpo", "plots"}


def test_what_was_just_made_is_fresh_and_keeps_its_key(workflow):
    assert workflow.stale() == {}
    assert workflow.keys() == workflow.keys()


@pytest.mark.parametrize(
    ("settings", "name", "said", "others"),
    [
        ({"optimizer": {"learning_rate": 1e-3}}, "train", "optimizer.learning_rate: 0.0001 -> 0.001", AFTER_TRAINING),
        ({"training": {"rollouts": 70}}, "train", "training.rollouts: 60 -> 70", AFTER_TRAINING),
        (
            {"conversion": {"mtp_num_layers": 0}},
            "convert",
            "conversion.mtp_num_layers: 1 -> 0",
            {"train", *AFTER_TRAINING},
        ),
        ({"training": {"on_code_change": "continue"}}, None, "", set()),
    ],
)
def test_a_setting_is_named_and_what_is_made_of_the_result_waits(workflow, settings, name, said, others):
    before = workflow.keys()
    workflow.settings = {"per_model": {"tiny": settings}}
    stale = workflow.stale()
    assert set(stale) == ({name} if name else set()) | others
    assert stale.get(name, "") == said
    changed = {result for result, key in workflow.keys().items() if key != before[result]}
    assert len(changed) == len(stale)


def test_other_code_and_versions_are_named(workflow):
    workflow.code, workflow.versions = "c2", {"torch": "2.1", "sglang": "0.6"}
    assert workflow.stale()["convert"] == (
        "download made again; its code; sglang not installed -> 0.6; torch 2.0 -> 2.1"
    )


def test_a_repeated_download_of_the_same_files_makes_nothing_else_stale(workflow):
    workflow.code = "c2"
    assert "download made again" in workflow.stale()["convert"]  # as long as its content is unknown
    workflow.make("download", model="tiny")
    workflow.code = "c1"
    assert set(workflow.stale()) == {"download"} | {"convert", "train", "evaluate base"} | AFTER_TRAINING
    workflow.make("download", model="tiny")
    assert workflow.stale() == {}
    workflow.make("download", content="y", model="tiny")
    assert workflow.stale()["convert"] == "another result of download"


def test_the_same_tensors_converted_again_leave_the_training_fresh(workflow):
    """torch_dist's other files differ between saves."""
    path = workflow.folder / "tiny/convert.json"
    manifest = read_json(path)
    before = content_of(manifest)
    manifest["files"][".metadata"] = {"bytes": 1, "sha256": "random"}
    assert content_of(manifest) == before
    manifest["files"]["__0_0.distcp"]["sha256"] = "other"
    assert content_of(manifest) != before


def test_a_data_set_is_also_how_prompts_are_made_of_it(workflow):
    path = workflow.folder / "data/sums-train.json"
    manifest = read_json(path)
    before = content_of(manifest)
    manifest["provenance"]["config"]["dataset"] |= {"instruction": "Box it."}
    assert content_of(manifest) != before
    manifest = read_json(path)
    manifest["provenance"]["config"]["dataset"] |= {"revision": "another, of the same files"}
    assert content_of(manifest) == before
    for unused in (None, False, {}, [], ""):
        manifest["provenance"]["config"]["dataset"] |= {"a_key_of_a_later_version": unused}
        assert content_of(manifest) == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda files: shutil.rmtree(files), "grpo-files is missing"),
        (lambda files: (files / "file").unlink(), "file is missing"),
        (lambda files: (files / "file").write_text("longer"), "file has another size"),
    ],
)
def test_missing_or_truncated_files_make_only_their_result_stale(workflow, damage, said):
    before = workflow.keys()
    damage(workflow.folder / "tiny/hf/grpo-files")
    stale = workflow.stale()
    assert stale["export"].endswith(said) and set(stale) == {"export", "evaluate grpo", "plots"}
    assert workflow.keys() != before
    workflow.make("export", model="tiny")
    assert workflow.stale() == {}


@pytest.mark.parametrize("content", [None, "{}", "[]", '{"provenance": {"config": 1}}', "not JSON"])
def test_without_a_result_there_is_nothing_to_say(workflow, content):
    path = workflow.folder / "tiny/hf/grpo.json"
    path.unlink() if content is None else path.write_text(content)
    state = workflow.states()["export"]
    assert not state.fresh and state.stale == ()


def test_the_first_changes_are_named_and_the_others_counted():
    before, now = {"a": {f"k{number}": 0 for number in range(6)}}, {"a": {f"k{number}": 1 for number in range(6)}}
    assert staleness.few(staleness.settings(before, now), ", ") == "a.k0: 0 -> 1, a.k1: 0 -> 1, a.k2: 0 -> 1, 3 more"
    assert list(staleness.settings({"a": "x" * 99}, {})) == [f'a: "{"x" * 28}... -> nothing']


def samples(workflow, weights="base"):
    """What a dry run says about an evaluation's samples."""
    return workflow.today().why("evaluate", model="tiny", dataset="sums-evaluation", weights=weights).split("; ")[-1]


@pytest.mark.parametrize(
    ("settings", "fate"),
    [
        ({"reward": {"max_seconds": 9.0}}, "kept"),
        ({"evaluation": {"samples_per_problem": 12}}, "kept"),
        ({"evaluation": {"temperature": 0.5}}, "drawn again"),
        ({"engine": {"server_arguments": {"dtype": "half"}}}, "drawn again"),
    ],
)
def test_an_evaluation_says_whether_it_samples_again(workflow, settings, fate):
    assert samples(workflow) == ""
    workflow.settings = {"per_model": {"tiny": settings}}
    assert samples(workflow) == f"its samples are {fate}"


def test_samples_depend_on_weights_and_prompts_that_are_made_again(workflow):
    workflow.settings = {"per_model": {"tiny": {"optimizer": {"learning_rate": 1e-3}}}}
    assert samples(workflow, "grpo") == "its samples are kept if the weights stay the same"
    assert samples(workflow) == ""
    workflow.settings = {"datasets": {"sums-evaluation": {"label_key": "answer"}}}
    assert samples(workflow) == "its samples are kept if the prompts stay the same"
    workflow.settings = {}
    workflow.make("download", content="other", model="tiny")
    assert samples(workflow) == "its samples are drawn again"
    workflow.code = "c2"
    assert samples(workflow) == "its samples are drawn again"


# ---- runs of a training ---------------------------------------------------------------------------------------------


def why(workflow):
    return workflow.today().why("train", model="tiny")


def test_a_training_says_whether_it_continues_and_how_to_do_otherwise(workflow):
    assert why(workflow) == ""
    workflow.settings = {"per_model": {"tiny": {"training": {"rollouts": 70}}}}
    assert why(workflow) == "training.rollouts: 60 -> 70; the run goes on after 60 rollouts"
    workflow.settings = {"per_model": {"tiny": {"optimizer": {"learning_rate": 1e-3}}}}
    begins = "; a new run begins, and the old one stays"
    assert why(workflow) == f"optimizer.learning_rate: 0.0001 -> 0.001{begins}"
    workflow.settings, workflow.code = {}, "c2"
    for stage in ("dataset", "download", "convert"):  # whose contents stay
        for which in STAGES[stage]:
            workflow.make(stage, **which)
    assert why(workflow) == f"its code{begins}; training.on_code_change: continue would go on"


def test_under_continue_other_code_leaves_a_finished_training_and_goes_on_with_another(workflow):
    workflow.settings = {"training": {"on_code_change": "continue"}}
    workflow.code, workflow.versions = "c2", {"torch": "2.1"}
    for stage in ("dataset", "download", "convert"):
        for which in STAGES[stage]:
            workflow.make(stage, **which)
    state = workflow.states()["train"]
    assert state.fresh and state.tolerated == ("its code", "torch 2.0 -> 2.1")
    workflow.settings["per_model"] = {"tiny": {"training": {"rollouts": 70}}}
    maker = runs.made_by(workflow.today().run("tiny"))[0]
    said = f"made by {maker['commit'] or maker['code']} (its code, torch 2.0 -> 2.1)"
    said += "; training.on_code_change: new would begin another"
    assert why(workflow) == f"training.rollouts: 60 -> 70; the run goes on after 60 rollouts, {said}"
    workflow.make("train", model="tiny")
    (folder,) = (workflow.folder / "tiny/grpo/grpo").glob("*/run.json")
    makers = json.loads(folder.read_text())["made_by"]
    assert [(maker["from_rollout"], maker["versions"]) for maker in makers] == [
        (1, {"torch": "2.0"}),
        (61, {"torch": "2.1"}),
    ]


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [
        ({"training": {"rollouts": 5000, "save_interval": 3}}, True),
        ({"training": {"max_tokens_per_gpu": 4608, "recompute": "full"}}, True),  # as after running out of memory
        ({"engine": {"mem_fraction_static": 0.4}}, True),
        ({"validation": {"interval": 0}}, True),
        ({"optimizer": {"learning_rate": 1e-5}}, False),
        ({"engine": {"server_arguments": {"attention_backend": "triton"}}}, False),
    ],
)
def test_what_continues_a_run_and_what_begins_another(workflow, changes, goes_on):
    was = workflow.today().run("tiny")
    workflow.settings = {"per_model": {"tiny": changes}}
    assert was and workflow.today().run("tiny") == (was if goes_on else None)


def without(key, *files):
    """Take a key out of records, as an earlier version of the pipeline wrote them that did not know it."""
    for file in files:
        record = read_json(file)
        section = (record.get("provenance") or record)["config"]
        *above, last = key.split(".")
        for name in above:
            section = section[name]
        del section[last]
        write_json(file, record)


@pytest.mark.parametrize("key", ["algorithm.dual_clip", "algorithm.overlong", "algorithm.overlong.mode"])
def test_a_key_that_came_since_changes_nothing_at_its_default(workflow, key):
    run = workflow.today().run("tiny")
    without(key, run / "run.json", run.parent / "train.json")
    assert workflow.stale() == {}
    workflow.settings = {"training": {"on_code_change": "continue"}}
    assert workflow.today().run("tiny") == run


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("algorithm.dual_clip", {"algorithm": {"dual_clip": 3.0}}),
        ("algorithm.overlong", {"algorithm": {"overlong": {"mode": "filter"}}}),
        ("algorithm.clip", {}),  # without a default: nobody knows what the earlier version did
    ],
)
def test_a_key_that_came_since_begins_another_run_at_any_other_value(workflow, key, settings):
    run = workflow.today().run("tiny")
    without(key, run / "run.json", run.parent / "train.json")
    workflow.settings = settings
    assert "train" in workflow.stale() and workflow.today().run("tiny") is None


@pytest.mark.parametrize(("stage", "which"), [("download", {"model": "tiny"}), ("dataset", {"name": "sums-train"})])
def test_other_weights_or_prompts_begin_another_run(workflow, stage, which):
    workflow.make(stage, content="other", **which)
    assert workflow.today().run("tiny") is None


def test_the_longest_of_two_matching_runs_is_continued(workflow):
    workflow.settings = {"training": {"on_code_change": "continue"}}
    first = workflow.today().run("tiny")
    second = shutil.copytree(first, first.with_name("second"))
    assert workflow.today().run("tiny") in (first, second)
    (second / "checkpoint-000080").mkdir()
    assert workflow.today().run("tiny") == second


# ---- existing results ---------------------------------------------------------------------------------


def test_a_folder_is_reused_only_if_nothing_it_depends_on_changed(tmp_path):
    from milepost.checkpoints.manifest import keep_manifest

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("x")
    job = {"config": {"a": 1}, "code": "c", "versions": {}, "inputs": {"download": "d"}}
    keep_manifest(write_manifest(tmp_path / "made.json", "convert", folder, ["file"], job))
    (tmp_path / "made.json").unlink()  # as Snakemake does before a job runs
    assert same_result(folder, job).files.keys() == {"file"}
    for part, other in {"config": {"a": 2}, "code": "d", "versions": {"torch": "2"}, "inputs": {}}.items():
        assert same_result(folder, job | {part: other}) is None
        assert same_result(folder, job | {part: other}, tuple({*job} - {part})) is not None
    (folder / "file").write_text("longer")
    assert same_result(folder, job) is None


def test_a_job_records_the_content_of_its_inputs(tmp_path, workflow):
    job = workflow.today().job("convert", model="tiny")
    write_json(tmp_path / "job.json", job)
    inputs = read_job(tmp_path / "job.json")["inputs"]
    assert inputs == {"download": content_of(read_json(workflow.folder / "tiny/download.json"))}
    (workflow.folder / "tiny/download.json").unlink()
    with pytest.raises(UserError, match="no such file"):
        read_job(tmp_path / "job.json")
