"""Tables, plots and the report, from manifests in the form that evaluations and trainings write."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from milepost.checkpoints.manifest import read_manifest, write_manifest
from milepost.common.errors import UserError
from milepost.configuration.schema import Reward
from milepost.evaluation.sampling import Sample, SampleFile
from milepost.evaluation.scores import scores
from milepost.problems.loading import Problem
from milepost.reporting.plots import all_plots
from milepost.reporting.report import HEAD, TAIL, shortened, training_facts
from milepost.reporting.results import pairs, read_scores, read_trainings
from milepost.reporting.tables import difference_table, in_words, markdown, points, readable_scores, score_table
from milepost.rewards.grader import Grader
from settings import section
from stages import flip_a_bit, job_arguments, script

SCRIPTS = Path(__file__).parents[2] / "workflow_scripts"
PROBLEMS, SAMPLES = 30, 8
SETTINGS = section(
    "evaluation",
    datasets=["aime"],
    samples_per_problem=SAMPLES,
    pass_at=[1, 4],
    max_response_tokens=4096,
    bootstrap_samples=500,
)
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>"\'&'
LONE_SURROGATE = "\ud800"


def evaluate(results: Path, model: str, weights: str, chance: float, seed: int, settings=SETTINGS, problems=PROBLEMS):
    """An evaluation whose samples are right with about ``chance``; some are cut off, one is hostile."""
    random = np.random.default_rng(seed)
    difficulty = np.linspace(0.3, -0.3, problems)
    questions = [f"What is {n} + {n}? {HOSTILE}{LONE_SURROGATE}" for n in range(problems)]
    rows = [Problem([{"role": "user", "content": text}], str(2 * n), n) for n, text in enumerate(questions)]
    samples = []
    for problem in range(problems):
        for sample in range(settings.samples_per_problem):
            is_right = random.random() < np.clip(chance + difficulty[problem], 0, 1)
            cut = not is_right and sample == 0
            answer = 2 * problem if is_right else 2 * problem + 1
            text = f"<think>{HOSTILE}{LONE_SURROGATE}" + ("" if cut else f"</think>\nIt is \\boxed{{{answer}}}.")
            tokens, finish = (4096, "length") if cut else (100, "stop")
            samples.append(Sample(problem, sample, 1, rows[problem].messages, text, tokens, finish, 0.1))
    path = results / model / "eval" / "aime" / f"{weights}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"evaluation": settings.model_dump(mode="json"), "engine": {"kind": "cpu"}}
    with Grader(Reward()) as grader:
        facts = {"dataset": "aime"} | scores(rows, samples, settings, grader)
    SampleFile(path.with_suffix(".jsonl"), "origin", samples, len(samples)).write_grades(facts["per_problem"])
    provenance = {"config": config, "code": "abc", "upstream": {}}
    write_manifest(path, "evaluate", path.parent, [f"{weights}.jsonl"], provenance, facts)
    return path


def train(results: Path, model: str, rollouts: int = 120, **columns) -> Path:
    """A training whose reward rises."""
    work = results / model / "grpo" / "grpo" / "0123456789ab"
    work.mkdir(parents=True)
    random, lines = np.random.default_rng(0), [{"rollout": 0, "validation_average": 0.3}]
    for rollout in range(1, rollouts + 1):
        done = rollout / rollouts
        row = {
            "rollout": rollout,
            "reward_mean": float(np.clip(0.35 + 0.4 * (1 - np.exp(-3 * done)) + random.normal(0, 0.05), 0, 1)),
            "pass_rate": 0.9,
            "response_length_mean": 900 + 700 * done + float(random.normal(0, 40)),
            "truncated_share": float(max(0, 0.2 * (1 - done) + random.normal(0, 0.01))),
            "clip_fraction": float(abs(random.normal(0.001, 0.0005))),
            "kl": None if rollout == 3 else 0.01 * done,
            "grad_norm": float(abs(random.normal(0.5, 0.1))),
            "loss": float(random.normal(0, 0.01)),
            "log_prob_diff": 0.012,
            "tokens_per_second": 12000 + float(random.normal(0, 300)),
            **{"seconds_rollout": 60.0, "seconds_train": 30.0, "seconds_sync": 2.5, "seconds_sleep_wake": 5.0},
            "seconds_step": 97.5,
        }
        lines.append(row | columns)
        if rollout % 20 == 0:
            lines.append({"rollout": rollout, "validation_average": 0.3 + 0.35 * (1 - math.exp(-3 * done))})
    (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"rollout": 1')
    samples = [
        {
            "rollout": rollout,
            "dataset": "sums",
            "place": "b.jsonl, line 3",
            "prompt": f"<|im_start|>user\n{HOSTILE}",
            "response": HOSTILE,
            "label": "4",
        }
        | {"answer": None, "reward": float(n == 0), "reason": "no_box", "tokens": 12, "finish": "stop"}
        for rollout in range(rollouts)
        for n in range(2)
    ]
    (work / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    facts = {
        "weights": f"checkpoint-{rollouts:06d}/weights",
        "metrics": "metrics.jsonl",
        "samples": "samples.jsonl",
        "rollouts": rollouts,
        "checkpoint": f"checkpoint-{rollouts:06d}",
        "best": {"checkpoint": "checkpoint-000100", "score": 0.65},
    }
    config = {
        "training": {"dataset": "dapo", "prompts_per_rollout": 32},
        "validation": {"dataset": "sums", "interval": 20},
        "optimizer": {"learning_rate": 1e-6},
    }
    path = results / model / "grpo" / "grpo" / "train.json"
    write_manifest(path, "train", work, ["metrics.jsonl"], {"config": config, "code": "def", "upstream": {}}, facts)
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Two models, each evaluated before and after training."""
    folder = tmp_path_factory.mktemp("reporting") / "results"
    for number, model in enumerate(("4B", "tiny_moe")):
        evaluate(folder, model, "base", 0.4, seed=number)
        evaluate(folder, model, "grpo", 0.7 if number == 0 else 0.38, seed=10 + number)
        train(folder, model)
        hub = folder / "hub" / f"Qwen--{model}@{'1' * 40}"
        hub.mkdir(parents=True)
        (hub / "config.json").write_text("{}")
        made_here = model == "tiny_moe"
        facts = {"repo": None if made_here else "Qwen/4B", "revision": "main", "commit": "1" * 40}
        write_manifest(folder / model / "download.json", "download", hub, ["config.json"], {"code": "d"}, facts)
    return folder


def run(name: str, config: dict, *arguments: object) -> subprocess.CompletedProcess:
    """Run an entry script as the rules do."""
    command = [sys.executable, script(name), *job_arguments(config), *map(str, arguments)]
    environment = {"PYTHONPATH": str(SCRIPTS), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def written(results) -> Path:
    """The folder after the three scripts ran."""
    evaluations = ["--scores", *sorted(results.glob("*/eval/*/*.json"))]
    trainings = ["--trainings", *sorted(results.glob("*/grpo/*/train.json"))]
    sources = ["--sources", *sorted(results.glob("*/download.json"))]
    tables, plots = results / "tables", results / "plots"
    outputs = ["--csv", tables / "scores.csv", "--differences", tables / "differences.csv"]
    outputs += ["--markdown", tables / "scores.md"]
    manifest, report = plots / "plots.json", results / "report.html"
    colors = {"plots": section("plots", dpi=80).model_dump(mode="json")}
    for result in (
        run("make_tables", {}, *evaluations, *outputs),
        run("make_plots", colors, *evaluations, *trainings, "--folder", plots, "--manifest", manifest),
        run("make_report", {}, *evaluations, *trainings, *sources, "--plots", manifest, "--html", report),
    ):
        assert result.returncode == 0, result.stderr
        assert "arning" not in result.stderr
    return results


@pytest.fixture
def reported(written, tmp_path):
    """``reported(name=[question, ...])`` -> the report over problem sets of these questions, and what was printed."""

    def make(**sets):
        for name, questions in sets.items():
            rows = [{"prompt": [{"role": "user", "content": text}], "label": "1"} for text in questions]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            facts, job = {"rows": len(rows)}, {"config": {"dataset": {"folder": "x", "file": f"{name}.jsonl"}}}
            write_manifest(tmp_path / f"{name}.json", "download", tmp_path, [f"{name}.jsonl"], job, facts)
        done = run(
            *("make_report", {}, "--scores", *sorted(written.glob("*/eval/*/*.json"))),
            *("--trainings", *sorted(written.glob("*/grpo/*/train.json")), "--html", tmp_path / "report.html"),
            *("--sources", *sorted(tmp_path.glob("*.json")), "--plots", written / "plots/plots.json"),
        )
        assert done.returncode == 0, done.stderr
        return (tmp_path / "report.html").read_text(), done.stderr

    return make


def test_prompts_that_were_trained_on_and_are_scored_are_told(reported):
    sets = {"dapo": ["one?", "two?", "three?"], "aime": ["three?", "four?"], "sums": ["five?"]}
    page, printed = reported(**sets)
    sentence = "1 of the 2 prompts of aime are in the training set dapo as well (line 1 is line 3)"
    assert (
        page.count(sentence) == printed.count(f"warning: {sentence}") == 1
    )  # only once, though two models share the sets
    assert "prompts of sums" not in page
    page, _ = reported(**sets | {"aime": ["four?"], "sums": ["two?"]})
    assert "prompts of aime" not in page and "1 of the 1 prompts of sums are in the training set dapo" in page


@pytest.mark.parametrize(
    ("rewards", "told"),
    [([0.0, 0.0, 0.0, 0.5], "all 0"), ([1.0, 1.0], "all 1"), ([0.0, 0.0, 0.1, 0.0], None), ([0.0, 1.0, 0.0], None)],
)
def test_rewards_that_were_all_equal_at_first_are_told(tmp_path, rewards, told):
    path = train(tmp_path, "4B")
    log = next(path.parent.rglob("metrics.jsonl"))
    names = ("reward_mean", "reward_min", "reward_max")
    rows = [{"rollout": number, **dict.fromkeys(names, reward)} for number, reward in enumerate(rewards, start=1)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = dict(training_facts(*read_trainings([path])))
    found = facts.get(f"rewards of the first {min(3, len(rewards))} rollouts")
    assert found == (told and f"{told}, which teaches nothing")


def test_overlong_answers_are_told_with_the_score_that_they_do_not_change(tmp_path):
    counts = {"overlong_share": 0.125, "reward_mean_without_overlong": 0.9}
    said = {}
    for model, more in (("4B", {}), ("9B", {"reward_mean_with_penalty": 0.5}), ("27B", {})):
        columns = {} if model == "27B" else counts | more
        facts = dict(training_facts(*read_trainings([train(tmp_path, model, reward_mean=0.75, **columns)])))
        said[model] = facts.get("overlong answers, last twentieth")
    assert said == {
        "4B": "12.5% have no part in the loss; mean reward 75.0% as graded, 90.0% of all others",
        "9B": "12.5% have a penalty; mean reward 75.0% as graded, 50.0% with the penalty, 90.0% of all others",
        "27B": None,
    }


def scores_of(results: Path, model: str = "4B"):
    return read_scores([results / model / "eval/aime/base.json", results / model / "eval/aime/grpo.json"])


def test_a_score_is_attributed_to_the_model_and_weights_that_its_path_names(results):
    base, trained = scores_of(results)
    assert (base.model, base.dataset, base.weights, base.is_base) == ("4B", "aime", "base", True)
    assert (trained.model, trained.weights, trained.is_base) == ("4B", "grpo", False)
    assert trained.problem_means().shape == (PROBLEMS,)
    assert trained.problem_means().mean() == pytest.approx(trained.facts["average"])


def test_the_csv_holds_the_numbers_of_the_manifests(written):
    table = pd.read_csv(written / "tables/scores.csv")
    assert list(zip(table["model"], table["weights"], strict=True)) == [
        ("4B", "base"),
        ("4B", "grpo"),
        ("tiny_moe", "base"),
        ("tiny_moe", "grpo"),
    ]
    facts = read_manifest(written / "4B/eval/aime/grpo.json").facts
    row = table.iloc[1]
    assert row["avg@n"] == pytest.approx(facts["average"])
    assert [row["avg@n low"], row["avg@n high"]] == pytest.approx(facts["interval"])
    assert row["pass@4"] == pytest.approx(facts["pass_at"]["4"])
    assert (row["truncated"], row["no </think>"]) == pytest.approx(
        (facts["truncated_share"], facts["no_think_end_share"])
    )
    assert (row["problems"], row["samples"], row["maj@n"]) == (PROBLEMS, SAMPLES, pytest.approx(facts["majority"]))


def test_the_difference_is_paired_over_problems(results):
    base, trained = scores_of(results)
    row = difference_table(pairs([base, trained])).iloc[0]
    differences = trained.problem_means() - base.problem_means()
    reach = stats.t.ppf(0.975, PROBLEMS - 1) * differences.std(ddof=1) / math.sqrt(PROBLEMS)
    assert row["difference"] == pytest.approx(differences.mean())
    assert (row["t low"], row["t high"]) == pytest.approx((differences.mean() - reach, differences.mean() + reach))
    assert row["bootstrap low"] < row["difference"] < row["bootstrap high"]


def test_scores_by_different_protocols_or_of_different_problems_are_not_paired(results, tmp_path):
    base = results / "4B/eval/aime/base.json"
    other = evaluate(tmp_path, "4B", "grpo", 0.5, 1, SETTINGS.model_copy(update={"temperature": 0.6}))
    fewer = evaluate(tmp_path, "4B", "less", 0.5, 1, problems=20)
    for trained, differing in ((other, "evaluation.temperature: 1.0 -> 0.6"), (fewer, "other prompts; other labels")):
        with pytest.raises(
            UserError, match=rf"can't be compared with .*base\.json: {re.escape(differing)}: evaluate both"
        ):
            pairs(read_scores([base, trained]))
    assert pairs(read_scores([other])) == []  # without a base there is nothing to compare with


def test_scores_made_by_other_code_or_versions_are_compared_with_a_note(results):
    base, trained = scores_of(results)
    (alike,) = pairs([base, trained])
    assert "different code" not in in_words(alike)
    manifest = json.loads(trained.manifest.path.read_text())
    manifest["provenance"] |= {"code": "other", "versions": {"sympy": "2.0"}}
    trained.manifest.path.write_text(json.dumps(manifest))
    (pair,) = pairs(read_scores([base.manifest.path, trained.manifest.path]))
    differs = "The two were scored with different code or versions (its code, sympy not installed -> 2.0)."
    assert in_words(pair) == f"{differs} {in_words(alike)}"


def test_a_flipped_bit_in_the_samples_is_found_and_named(tmp_path):
    (score,) = read_scores([evaluate(tmp_path, "4B", "base", 0.5, 1)])
    flip_a_bit(score.manifest.root / "base.jsonl")
    with pytest.raises(UserError, match=r"base\.jsonl: its sha256 is not the one"):
        score.read_samples({(0, 0)})


def test_words_claim_no_more_than_the_interval(results):
    (clear,), (unclear,) = pairs(scores_of(results)), pairs(scores_of(results, "tiny_moe"))
    assert "training helped" in in_words(clear)
    assert "can't tell the two apart" in in_words(unclear)
    assert [points(share) for share in (0.0314, -0.0314, -0.0001, math.nan)] == ["+3.1", "−3.1", "0.0", "–"]


def test_one_problem_alone_has_a_score_without_an_interval(tmp_path):
    settings = SETTINGS.model_copy(update={"bootstrap_samples": 10})
    files = [evaluate(tmp_path, "4B", weights, 0.5, 1, settings, problems=1) for weights in ("base", "grpo")]
    found = read_scores(files)
    (pair,) = pairs(found)
    assert "Without a spread over problems there is no interval" in in_words(pair)
    assert list(readable_scores(score_table(found))["95% interval"]) == ["–", "–"]
    (plot, _) = all_plots([], found, [pair])
    assert plot.drawings(section("plots", dpi=50))["png"].startswith(b"\x89PNG")


def test_markdown_tables_are_whole(written):
    text = (written / "tables/scores.md").read_text()
    assert "## Scores" in text and "## Differences, second minus first" in text and "## Format" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == (2 + 4) + (2 + 2) + (2 + 4)
    assert {line.count("|") for line in rows[:6]} == {rows[0].count("|")}
    assert "None." in markdown({"Differences": difference_table([])})
    assert "- On aime, 4B/grpo went from " in text.partition("## In words")[2]


def test_metrics_of_a_rollout_and_its_validation_are_one_row(results):
    (training,) = read_trainings([results / "4B/grpo/grpo/train.json"])
    assert (training.model, training.run) == ("4B", "grpo")
    assert list(training.column("reward_mean").index) == list(range(1, 121))
    assert list(training.column("validation_average").index) == [0, 20, 40, 60, 80, 100, 120]
    assert len(training.column("kl")) == 119  # null is no number
    assert training.column("unknown").empty


def test_plots_cover_every_model_and_both_themes(written):
    manifest = read_manifest(written / "plots/plots.json").require(digests=True)
    names = {plot["png"].removesuffix(".png") for plot in manifest.facts["plots"]}
    assert names == {"scores"} | {
        f"{name}{model}{end}"
        for model in ("4B", "tiny_moe")
        for name, end in (
            ("problems-", "-grpo-aime"),
            ("reward-", ""),
            ("length-", ""),
            ("health-", ""),
            ("phases-", ""),
        )
    }
    for plot in manifest.facts["plots"]:
        assert (manifest.root / plot["png"]).read_bytes().startswith(b"\x89PNG")
        light, dark = ((manifest.root / plot[theme]).read_text() for theme in ("light", "dark"))
        assert "<svg" in light and light != dark


def test_the_configured_colours_are_drawn_and_the_same_data_give_the_same_bytes(results):
    settings = section("plots", color_base="#aa1122", color_trained="#11aa22")
    plot = all_plots([], scores_of(results), [])[0]
    drawings = plot.drawings(settings)
    assert b"#aa1122" in drawings["light"] and b"#11aa22" in drawings["light"]
    assert drawings == plot.drawings(settings)


def test_plots_of_models_that_are_no_longer_listed_go(results, tmp_path):
    (tmp_path / "reward-old.png").write_bytes(b"old")
    config = {"plots": section("plots", dpi=50).model_dump(mode="json")}
    evaluations = sorted((results / "4B/eval/aime").glob("*.json"))
    result = run(
        "make_plots", config, "--scores", *evaluations, "--folder", tmp_path, "--manifest", tmp_path / "plots.json"
    )
    assert result.returncode == 0, result.stderr
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["problems-4B-grpo-aime.png", "scores.png"]


def test_a_short_run_or_one_without_some_metrics_is_drawn_too(tmp_path):
    for rollouts in (1, 4):
        (training,) = read_trainings([train(tmp_path / str(rollouts), "4B", rollouts, kl=None, grad_norm=None)])
        for plot in all_plots([training], [], []):
            assert plot.drawings(section("plots", dpi=50))["light"].startswith(b"<?xml")


class Page(HTMLParser):
    """Everything that a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.handlers, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data):
        self.text.append(data)


def test_what_a_model_wrote_is_text_in_the_page_and_never_code(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and not page.handlers
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in page.addresses)
    assert not re.search(r"@import|url\(", text)
    assert HOSTILE in "".join(page.text)


def test_the_report_holds_what_a_reader_asks_for(written):
    text = "".join(Page((written / "report.html").read_text(encoding="utf-8")).text)
    for expected in (
        "4B, tiny_moe, before and after GRPO",
        "training helped",
        "can't tell the two apart",
        "learning_rate: 1.0e-06",  # settings
        f"Qwen/4B at {'1' * 40}",  # origins
        "torch 2.",
        "rollouts",
        "checkpoint-000120",
        "Base weights on aime, samples",
        "Samples of the last rollouts of grpo",
        "cut off by the cap",
        "1 min 38 s (rollout 1 min, train 30 s, sync 2.5 s, sleep and wake 5 s)",
        "the same problems, protocol and reward for both weights",
    ):
        assert expected in text, expected
    assert "None" not in text


def test_samples_are_of_both_kinds_and_say_what_the_grader_said(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    assert text.count('class="mark right"') == text.count('class="mark wrong"') == 3 * 3 * 2
    assert "reward 1 (correct)" in text and "reward 0 (wrong)" in text
    assert "rollout 119, sums, b.jsonl, line 3" in text


def test_a_long_response_is_shortened_in_its_middle():
    shown = shortened("a" * HEAD + "b" * 1234 + "c" * TAIL)
    assert "1,234 characters left out" in shown and "b" not in shown.replace("[… 1,234 characters left out …]", "")


def test_a_manifest_of_another_kind_is_refused(results):
    with pytest.raises(UserError, match="a manifest of kind 'train', not 'evaluate'"):
        read_scores([results / "4B/grpo/grpo/train.json"])
