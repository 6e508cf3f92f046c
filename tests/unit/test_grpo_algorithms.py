"""Other papers' algorithms: their settings in docs/algorithms.md, and whole trainings of a tiny random model."""

import json
import re
from typing import get_args

import pytest
import yaml

import grpo_run
from milepost.configuration import schema
from milepost.configuration.layers import merge
from settings import configured

TWO_STEPS = {"global_batch": 6, "rollouts": 2}
PAPERS = {
    "dapo": {"dual_clip": 3.0, "loss_aggregation": "token_mean", "overlong": {"mode": "penalty", "buffer": 4}},
    "dr_grpo": {"advantage": "dr_grpo", "loss_aggregation": "constant_length", "overlong": {"mode": "filter"}},
    "gspo": {"advantage": "rloo", "loss": "gspo", "clip": 3e-4, "clip_high": 4e-4, "correction": "sequence_mask"},
    "cispo": {"advantage": "reinforce_plus_plus", "loss": "cispo", "correction": "token_truncate"},
    "engine": {"advantage": "reinforce_plus_plus_baseline", "old_log_probs": "engine"},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = grpo_run.prepare(tmp_path_factory.mktemp("algorithms"))
    grpo_run.convert_model(folder)
    return folder


@pytest.mark.parametrize("name", PAPERS)
def test_a_run_takes_all_its_steps_and_logs_what_its_algorithm_measures(prepared, name):
    changes = {"training": TWO_STEPS, "validation": {"interval": 0}, "algorithm": PAPERS[name]}
    if name == "dr_grpo":  # within the 8 tokens of the others a random model hardly ever stops
        changes["sampling"] = {"max_response_tokens": 100}
    grpo_run.run(grpo_run.arguments(prepared, prepared / name, **changes))
    rows = [json.loads(line) for line in (prepared / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["rollout"] for row in rows] == [1, 2] and not any(row["bad_steps"] for row in rows)
    last = rows[-1]
    assert last["grad_norm"] > 0
    # Engine and trainer differ by rounding: to bfloat16, once the weights have left the Hub's values.
    assert last["importance_mean"] == pytest.approx(1, abs=0.1)
    assert ("importance_clipped_share" in last) == ("correction" in PAPERS[name])
    assert (0 < last["overlong_share"] < 1) if name == "dr_grpo" else ("overlong_share" in last) == (name == "dapo")
    if name == "gspo":
        assert last["clip_fraction"] > 0  # in the second step, after one at a learning rate of 1e-3


def test_the_papers_settings_can_be_copied_from_the_docs(root):
    page = (root / "docs" / "algorithms.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.S)]
    assert len(blocks) == 8
    for settings in blocks:
        model = configured(settings | {"models": ["9B"]}).models["9B"].model_dump(mode="json")
        for section, given in settings.items():
            assert merge(model[section], given) == model[section]


@pytest.mark.parametrize("kind", ["Advantage", "PolicyLoss", "Aggregation", "Correction"])
def test_every_choice_is_in_the_docs(root, kind):
    page = (root / "docs" / "algorithms.md").read_text()
    assert all(f"| `{name}` |" in page for name in get_args(getattr(schema, kind)))
