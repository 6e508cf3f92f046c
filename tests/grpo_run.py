"""A whole training of a random tiny model, in this or another process, with rewards that vary between random responses.

The real reward of a random model is always 0, so a fixed function of the text replaces the grader.
"""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import convert
import train
from milepost.checkpoints.manifest import write_manifest
from milepost.common.errors import UserError
from milepost.configuration.layers import merge
from milepost.configuration.schema import TinyModel
from milepost.rewards.base import Verdict
from milepost.rewards.grader import Grader
from milepost.tiny.checkpoint import hub_tensors, model_config, random_model, write_checkpoint
from milepost.tiny.problems import all_additions
from milepost.tiny.tokenizer import train_tokenizer
from settings import training_settings
from stages import convert_arguments, download_manifest, job_arguments

SETTINGS = {
    "training": {
        "dataset": "sums",
        "prompts_per_rollout": 3,
        "samples_per_prompt": 4,
        "global_batch": 12,
        "rollouts": 4,
        "max_tokens_per_gpu": 200,
        "recompute": "none",
        "save_interval": 2,
    },
    "validation": {"interval": 2, "dataset": "other-sums", "samples_per_problem": 2, "max_response_tokens": 6},
    "optimizer": {"learning_rate": 1e-3},
    "sampling": {"max_response_tokens": 8},
}


class FixedReward(Grader):
    """Right or wrong by the text alone, with the reward's kind as the reason.

    ``hook`` is called before each grading with the number of gradings so far.
    """

    hook = staticmethod(lambda gradings: None)
    gradings = 0

    def grade(self, responses):
        self.hook(self.gradings)
        self.gradings += 1
        return [
            Verdict(float(sum(map(ord, response.response)) % 2 == 0), None, self.settings.kind)
            for response in responses
        ]


def prepare(folder: Path, kind: str = "dense", rows: int = 7, **tiny) -> Path:
    """Everything that a training of ``rows`` prompts reads, below ``folder``; `convert_model` for the weights."""
    tiny = TinyModel(kind=kind, **{"layers": 4, "hidden": 64, **tiny})
    tokenizer = train_tokenizer()
    config = model_config(tiny, tokenizer)
    write_checkpoint(folder / "hub", config, hub_tensors(tiny, random_model(tiny, config)), tokenizer)
    download_manifest(folder / "hub", folder / "download.json")
    for split, count in (("train", rows), ("evaluation", 2)):
        (folder / split).mkdir()
        lines = [json.dumps(addition.row("prompt", "label")) for addition in all_additions(split)[:count]]
        (folder / split / "rows.jsonl").write_text("\n".join(lines))
        facts = {"rows": count}
        provenance = {"config": {"dataset": {"folder": "here", "file": "rows.jsonl"}}}
        write_manifest(folder / f"{split}.json", "download", folder / split, ["rows.jsonl"], provenance, facts)
    return folder


def convert_model(folder: Path) -> None:
    sys.argv = ["convert", *convert_arguments(folder / "download.json", folder / "torch_dist")]
    convert.main()


def arguments(folder: Path, work: Path, data: Sequence[str] = ("train",), **changes) -> list[str]:
    """Command line of a training in ``work`` on the sets ``data``; ``changes`` are settings: section={key: value}."""
    settings = training_settings(**merge(SETTINGS, changes))
    return [
        *job_arguments(settings.model_dump(mode="json")),
        *("--hub", str(folder / "download.json"), "--weights", str(folder / "torch_dist.json")),
        *("--data", *(str(folder / f"{name}.json") for name in data)),
        *("--validation", str(folder / "evaluation.json")),
        *("--work", str(work), "--manifest", f"{work}.json"),
    ]


def run(command_line: list[str], hook=None) -> None:
    """Train here; ``hook`` as in `FixedReward`."""
    FixedReward.hook = staticmethod(hook or (lambda gradings: None))
    train.Grader = FixedReward
    sys.argv = ["train", *command_line]
    try:
        train.run(train.main)
    finally:
        gc.collect()  # break cycles of model and groups, which keep 72 sockets and pipes open per training


def run_until_killed(command_line: list[str], grading: int) -> None:
    """Train in another process, which dies by SIGKILL before the ``grading``-th grading, counted from 0."""
    environment = os.environ | {
        "KILL_AT": str(grading),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run([sys.executable, __file__, *command_line], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-3000:]


if __name__ == "__main__":
    # KILL_AT: the grading before which this process gets SIGKILL; FAIL_AT: the grading that fails.
    kill_at, fail_at = (int(os.environ.get(name, -1)) for name in ("KILL_AT", "FAIL_AT"))

    def end(gradings):
        if gradings == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if gradings == fail_at:
            raise UserError("the grader is out of breath")

    run(sys.argv[1:], end)
