"""Compare the engine's throughput with SGLang's offline engine, or drafting with no drafting.

Both sides use the same arguments, requests and GPU, one after the other in one run.

    PYTHONPATH=workflow_scripts python benchmarks/gpu_rollout.py --model 4B --folder results/random/4B
    PYTHONPATH=workflow_scripts python benchmarks/gpu_rollout.py --model 35B_A3B --folder ... --drafting
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

from milepost.configuration.loading import load
from milepost.configuration.schema import Engine
from milepost.rollout.engine import Request, SamplingParams
from milepost.rollout.sglang_engine import start
from milepost.rollout.sglang_server import server_arguments

CONFIG = Path(__file__).resolve().parents[1] / "config"
OFFLINE = """
import json, sys, time
import sglang
if __name__ == "__main__":
    given = json.load(open(sys.argv[1]))
    engine = sglang.Engine(**given["arguments"])
    call = dict(input_ids=given["prompts"], sampling_params=given["sampling"], return_logprob=True)
    engine.generate(**call | dict(input_ids=given["prompts"][:8]))
    for _ in range(given["turns"]):
        engine.flush_cache()
        start = time.perf_counter()
        answers = engine.generate(**call)
        seconds = time.perf_counter() - start
        print("SECONDS", seconds, sum(len(answer["output_ids"]) for answer in answers), flush=True)
    engine.shutdown()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="4B")
    parser.add_argument("--folder", type=Path, required=True, help="a checkpoint in the Hub's format")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--response", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--mem-fraction", type=float, default=0.7)
    parser.add_argument(
        "--drafting", action="store_true", help="compare EAGLE on the MTP head with no drafting, instead of with SGLang"
    )
    parser.add_argument("--server-arguments", type=json.loads, default={}, help="JSON")
    arguments = parser.parse_args()
    recipes = load(CONFIG / "config.yaml", CONFIG / "models", {}).models
    settings = Engine(
        kind="sglang",
        gpus_per_engine=1,
        mem_fraction_static=arguments.mem_fraction,
        max_running_requests=arguments.prompts,
        speculation=recipes["35B_A3B"].engine.speculation if arguments.drafting else None,
        server_arguments=arguments.server_arguments,
    )
    draw = random.Random(0)
    prompts = [[draw.randrange(1, 200000) for _ in range(arguments.prompt_tokens)] for _ in range(arguments.prompts)]
    ours, capacity = engine_rate(arguments, settings, prompts)
    note = {
        "prompts": arguments.prompts,
        "response_tokens": arguments.response,
        "mem_fraction_static": arguments.mem_fraction,
        "server_arguments": arguments.server_arguments,
        "running_at_once": capacity,
        "tokens_per_second": round(ours),
    }
    if arguments.drafting:
        theirs, _ = engine_rate(arguments, settings.model_copy(update={"speculation": None}), prompts)
        name, note = "drafting_against_none", note | {"tokens_per_second_without": round(theirs)}
    else:
        theirs = offline_rate(arguments, settings, prompts)
        name, note = "rollout_share_of_sglang", note | {"sglang_tokens_per_second": round(theirs)}
    record(name, arguments.model, ours / theirs, "share", gpus=1, file="gpu_rollout", **note)


def engine_rate(arguments: argparse.Namespace, settings: Engine, prompts: list[list[int]]) -> tuple[float, int]:
    """Tokens per second of our engine on one GPU (its best run), and how many requests it runs at once."""
    engine = start(arguments.folder, settings, arguments.folder / "logs")
    params = SamplingParams(max_new_tokens=arguments.response)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    try:
        engine.generate(requests[:8], params)
        rates = []
        for _ in range(arguments.turns):
            engine.servers[0].flush()
            began = time.perf_counter()
            answers = engine.generate(requests, params)
            rates.append(sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - began))
            print(f"engine: {rates[-1]:.0f} tokens/s", flush=True)
        return max(rates), engine.servers[0].capacity()
    finally:
        engine.close()


def offline_rate(arguments: argparse.Namespace, settings: Engine, prompts: list[list[int]]) -> float:
    """Tokens per second of SGLang's offline engine with the same arguments, in a separate process."""
    given = server_arguments(arguments.folder, settings, 0)
    work = {
        "arguments": {name: value for name, value in given.items() if name not in ("host", "log_level_http")},
        "prompts": prompts,
        "sampling": {"temperature": 1.0, "max_new_tokens": arguments.response, "ignore_eos": True},
        "turns": arguments.turns,
    }
    with tempfile.TemporaryDirectory() as folder:
        script, file = Path(folder) / "offline.py", Path(folder) / "work.json"
        script.write_text(OFFLINE)
        file.write_text(json.dumps(work))
        done = subprocess.run([sys.executable, script, file], stdout=subprocess.PIPE, text=True, check=True)
    turns = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    rates = [int(tokens) / float(seconds) for seconds, tokens in turns]
    print("offline:", ", ".join(f"{rate:.0f}" for rate in rates), "tokens/s", flush=True)
    return max(rates)


if __name__ == "__main__":
    main()
