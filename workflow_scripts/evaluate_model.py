"""Evaluate a checkpoint on one problem set: sample, grade, score. Saved samples of the same weights are reused."""

import argparse
from pathlib import Path

from milepost.checkpoints.manifest import read_manifest, write_manifest
from milepost.common.errors import run
from milepost.common.files import hold
from milepost.common.jobs import job_parser
from milepost.common.machine import machine
from milepost.configuration.schema import Engine, Evaluation, Reward
from milepost.evaluation.problems import load_problems
from milepost.evaluation.sampling import BATCH, SampleFile, origin_of, sample_problems, wanted_samples
from milepost.evaluation.scores import scores
from milepost.rewards.grader import Grader
from milepost.rollout.engine import start_engine
from milepost.rollout.prompts import load_tokenizer, stop_token_ids


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="manifest of a download or an export")
    parser.add_argument("--data", type=Path, required=True, help="manifest of the problem set")
    parser.add_argument("--samples", type=Path, required=True, help="samples.jsonl to write or continue")
    parser.add_argument("--manifest", type=Path, required=True, help="scores.json to write")
    arguments = parser.parse_args()
    with hold(arguments.manifest):
        evaluate(arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    config = arguments.job["config"]
    settings, reward = Evaluation.model_validate(config["evaluation"]), Reward.model_validate(config["reward"])
    engine_settings = Engine.model_validate(config["engine"] | {"mem_fraction_static": settings.mem_fraction_static})
    model = read_manifest(arguments.model)
    problems = load_problems(read_manifest(arguments.data), reward.labels)

    weights = {"files": {name: entry["sha256"] for name, entry in sorted(model.files.items())}}
    file = SampleFile.open(arguments.samples, origin_of(weights | arguments.job["sampler"], problems))
    wanted = wanted_samples(problems, settings)
    samples = file.of(wanted)
    if len(samples) < len(wanted):
        model.require(digests=True)
        tokenizer = load_tokenizer(model.root)
        stops = stop_token_ids(model.root, tokenizer)
        logs = arguments.samples.with_name(f"{arguments.samples.stem}-engine")
        engine = start_engine(model.root, engine_settings, logs, max_requests=min(len(wanted), BATCH))
        try:
            samples = sample_problems(engine, tokenizer, stops, problems, settings, file)
        finally:
            engine.close()
    with Grader(reward) as grader:
        found = scores(problems, samples, settings, grader)
    file.write_grades(found["per_problem"])
    facts = {"dataset": arguments.data.stem, **found, "machine": machine()}
    files = [arguments.samples.name]
    write_manifest(arguments.manifest, "evaluate", arguments.samples.parent, files, arguments.job, facts)


if __name__ == "__main__":
    run(main)
