"""A user's reward trains the tiny model on a task without mathematics or labels; editing it reruns what needs it."""

import json
import re
import shutil
from statistics import mean

import pandas
import pytest

pytestmark = pytest.mark.slow

MY_REWARDS = '''
"""Rewards of my own."""
from letters import VOWELS


def vowels(sample):
    """The share of vowels in what was said."""
    said = sample.response
    if not said:
        return 0.0, "nothing said"
    found = sum(letter in VOWELS for letter in said.lower())
    return found / len(said), f"{found} vowels on {sample.row['topic']}"
'''
LETTERS = 'VOWELS = "aeiou"\n'
TOPICS = ["rain", "the sea", "bread", "old trains", "a lost key", "night", "paper", "snow"]
SETTINGS = """
models: [tiny]
datasets:
  topics: {folder: ., file: topics.jsonl}
reward: {function: my_rewards.py:vowels}
training: {dataset: topics, prompts_per_rollout: 4, samples_per_prompt: 8, global_batch: 32, rollouts: 20}
optimizer: {learning_rate: 3.0e-3}
sampling: {max_response_tokens: 12}
validation: {interval: 0}
evaluation: {datasets: [topics], samples_per_problem: 4, pass_at: [1, 4], max_response_tokens: 12}
per_model: {tiny: {source: {tiny: {hidden: 64, warm_up: {steps: 0}}}}}
"""


@pytest.fixture(scope="module")
def run(snakemake, root):
    """Run the workflow in a user's folder."""

    def call(folder, *arguments, check=True):
        flags = ("--cores", "2", "--directory", str(folder), "--configfile", str(folder / "mine.yaml"))
        done = snakemake(*flags, *arguments, snakefile=root / "Snakefile", cwd=folder)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """A user's folder with all results."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_rewards.py").write_text(MY_REWARDS)
    (folder / "letters.py").write_text(LETTERS)
    rows = [{"prompt": [{"role": "user", "content": f"Write on {topic}."}], "topic": topic} for topic in TOPICS]
    (folder / "topics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(SETTINGS)
    run(folder, "--", "all")
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it to edit."""
    return shutil.copytree(trained, tmp_path / "user", symlinks=True)


def jobs(said):
    return re.findall(r"^Job \d+: (.+)$", said, flags=re.MULTILINE)


def test_the_reward_rises_and_the_logs_say_why(trained):
    [log] = trained.glob("results/tiny/grpo/grpo/*/metrics.jsonl")
    rewards = [json.loads(line)["reward_mean"] for line in log.read_text().splitlines()]
    assert len(rewards) == 20
    assert mean(rewards[-5:]) > 1.25 * mean(rewards[:5])
    samples = [json.loads(line) for line in log.with_name("samples.jsonl").read_text().splitlines()]
    for sample in samples:
        said = sample["response"].lower()
        found = sum(letter in "aeiou" for letter in said)
        assert sample["reward"] == pytest.approx(found / max(1, len(said))) and sample["label"] is None
        assert re.fullmatch(rf"{found} vowels on ({'|'.join(TOPICS)})|nothing said", sample["reason"])


def test_the_tables_show_mean_rewards_and_nothing_about_boxes(trained):
    scores = {
        weights: json.loads((trained / f"results/tiny/eval/topics/{weights}.json").read_text())["facts"]
        for weights in ("base", "grpo")
    }
    table = (trained / "results/tables/scores.md").read_text()
    assert scores["grpo"]["average"] > scores["base"]["average"]
    assert f"{scores['grpo']['average']:.3f}" in table and "mean reward" in table
    assert "box" not in table and "think" not in table


def test_a_comment_in_the_reward_reruns_nothing(run, folder):
    file = folder / "my_rewards.py"
    written = file.read_text().replace("Rewards of my own.", "Rewards, mine.").replace("if not said:", "if (not said):")
    file.write_text(f"# of mine\n{written}")
    (folder / "letters.py").write_text(LETTERS + "# and y?\n")
    assert "Nothing to be done" in run(folder, "-n", "--", "all")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("my_rewards.py", "0.0, ", "-0.1, "),
        ("my_rewards.py", "nothing said", "silence"),
        ("letters.py", "aeiou", "aeiouy"),
    ],
)
def test_a_changed_line_grades_again_and_begins_a_new_training(run, folder, name, old, new):
    file = folder / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    due = jobs(run(folder, "-n", "--", "all"))
    assert not any("fetch" in job or "convert" in job for job in due)
    [training] = [job for job in due if "train with GRPO" in job]
    assert "my_rewards.py" in training and "a new run begins, and the old one stays" in training
    [base] = [job for job in due if "evaluate the base weights" in job]
    assert base.endswith("its samples are kept)")


def test_samples_that_are_kept_are_graded_by_the_new_line(run, folder):
    base = folder / "results/tiny/eval/topics/base"
    before, samples = json.loads(base.with_suffix(".json").read_text()), pandas.read_json(f"{base}.jsonl", lines=True)
    (folder / "my_rewards.py").write_text("def vowels(sample): return float(sample.tokens)\n")
    run(folder, "--", "results/tiny/eval/topics/base.json")
    after = json.loads(base.with_suffix(".json").read_text())
    again = pandas.read_json(f"{base}.jsonl", lines=True)
    sampled = ["problem", "sample", "seed", "response", "tokens", "finish", "seconds"]
    assert again[sampled].equals(samples[sampled])
    assert (again["reward"] == again["tokens"]).all() and (samples["reward"] < 1).all()
    assert after["facts"]["average"] == pytest.approx(after["facts"]["mean_tokens"])
    assert before["facts"]["average"] < 1 < after["facts"]["average"]


def test_a_data_sets_own_reward_fetches_nothing_again(run, folder):
    due = jobs(run(folder, "-n", "--config", "datasets={topics: {reward: {kind: exact}}}", "--", "download_tiny"))
    assert due == []
    said = run(folder, "-n", "--config", "datasets={topics: {reward: {kind: exact}}}", "--", "all", check=False)
    assert "error: topics.jsonl: 8 of 8 rows are unusable: no 'label'" in said


def test_a_mistake_in_the_reward_is_reported_before_the_first_job(run, folder):
    for flags in (("-n",), ()):
        said = run(folder, *flags, "--config", "reward={function: my_rewards.py:vowel}", "--", "all", check=False)
        assert "error: my_rewards.py: has no function 'vowel', did you mean 'vowels'?" in said
        assert "Traceback" not in said


def test_a_reward_is_tried_on_a_file_of_answers(run, folder):
    (folder / "answers.jsonl").write_text(
        '{"response": "aaab", "row": {"topic": "rain"}}\n{"response": "tree", "row": {}}\n{"response": ""}\n'
    )
    said = run(folder, "--config", "answers=answers.jsonl", "--", "check_reward")
    assert re.search(r"^1 +– +– +0\.75 +no +3 vowels on rain +aaab", said, flags=re.MULTILINE), said
    assert re.search(r"^2 +– +– +0 +no +grading_error +tree", said, flags=re.MULTILINE), said
    assert "warning: my_rewards.py:vowels: KeyError: 'topic' (my_rewards.py, line 12)" in said
    assert "3 answers, mean reward 0.25, 0 correct, grading failed for 1" in said
    said = run(folder, "--config", "answers=nowhere.jsonl", "--", "check_reward", check=False)
    assert "error: answers: nowhere.jsonl: No such file or directory" in said
