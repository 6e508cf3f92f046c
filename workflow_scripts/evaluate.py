"""Evaluate a checkpoint on one problem set: sample, grade, score. Saved samples of the same weights are not redone."""

import argparse
from pathlib import Path
from typing import Any

from checkpoints.manifest import Manifest, read_manifest, write_manifest
from common.errors import UserError, run
from common.files import hold
from common.jobs import job_parser
from common.versions import SAMPLING, versions
from configuration.code import code_digest
from configuration.provenance import engine_file
from configuration.schema import Engine, Evaluation, Reward
from evaluation.problems import load_problems
from evaluation.sampling import BATCH, SampleFile, origin_of, read_samples, sample_problems, wanted_samples
from evaluation.scores import scores
from rewards.math import Grader
from rollout.engine import start_engine
from rollout.prompts import load_tokenizer, stop_token_ids

SCRIPTS = Path(__file__).parent


def main() -> None:
    parser = job_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="manifest of a download or an export")
    parser.add_argument("--data", type=Path, required=True, help="manifest of the problem set")
    parser.add_argument("--samples", type=Path, required=True, help="samples.jsonl to write, or to go on with")
    parser.add_argument("--manifest", type=Path, required=True, help="scores.json to write")
    parser.add_argument(
        "--regrade", action="store_true", help="grade the saved samples again, and fail where one is missing"
    )
    arguments = parser.parse_args()
    with hold(arguments.manifest):
        evaluate(arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    config = arguments.job["config"]
    settings, reward = Evaluation.model_validate(config["evaluation"]), Reward.model_validate(config["reward"])
    engine_settings = Engine.model_validate(config["engine"]).model_copy(
        update={"mem_fraction_static": settings.mem_fraction_static}
    )
    model = read_manifest(arguments.model)
    problems = load_problems(read_manifest(arguments.data))

    origin = origin_of(sampler(model, engine_settings), problems, settings)
    if arguments.regrade:  # whatever version of the pipeline sampled them
        found, *_ = read_samples(arguments.samples)
        origin["model"] |= {key: found["model"][key] for key in ("code", "versions")} if found else {}
    file, wanted = SampleFile.open(arguments.samples, origin), wanted_samples(problems, settings)
    samples = file.of(wanted)
    if arguments.regrade and len(samples) < len(wanted):
        raise UserError(
            f"{arguments.samples}: holds {len(samples)} of {len(wanted)} samples of these weights and settings: "
            "run without --regrade to sample the others"
        )
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
        facts = {"dataset": arguments.data.stem, **scores(problems, samples, settings, grader)}
    files = [arguments.samples.name]
    write_manifest(arguments.manifest, "evaluate", arguments.samples.parent, files, arguments.job, facts)


def sampler(model: Manifest, engine: Engine) -> dict[str, Any]:
    """What identifies the model that samples: its files, the engine, and the code that runs them."""
    return {
        "files": {name: entry["sha256"] for name, entry in sorted(model.files.items())},
        "engine": engine.model_dump(mode="json", include={"kind", "speculation", "server_arguments"}),
        "code": code_digest(SCRIPTS, "evaluation/sampling.py", engine_file(engine.kind)),
        "versions": versions(SAMPLING),
    }


if __name__ == "__main__":
    run(main)
