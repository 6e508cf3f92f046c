"""Time the CPU rollout engine against transformers' generate, alternating in one run, and print the ratio.

256 samples (32 prompts of 40 tokens, 8 samples each) of 24 new tokens from a random model of 8 layers, hidden 256.

    PYTHONPATH=workflow_scripts python benchmarks/rollout_cpu.py [dense|moe] [turns]
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from milepost.configuration.loading import load
from milepost.configuration.schema import TinyModel
from milepost.rollout.engine import Request, SamplingParams, start_engine
from milepost.tiny.checkpoint import hub_tensors, model_config, random_model, write_checkpoint
from milepost.tiny.tokenizer import train_tokenizer

CONFIG = Path(__file__).resolve().parents[1] / "config"
PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 32, 8, 40, 24


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "dense"
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    transformers.logging.set_verbosity_error()
    tiny, tokenizer = TinyModel(kind=kind, layers=8, hidden=256), train_tokenizer()
    settings = load(CONFIG / "config.yaml", CONFIG / "models", {}).models["tiny"].engine
    config = model_config(tiny, tokenizer)
    model = random_model(tiny, config).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config, hub_tensors(tiny, model), tokenizer)
        engine = start_engine(folder, settings, folder)

    prompts = torch.randint(256, (PROMPTS, PROMPT_TOKENS))
    requests = [
        Request(prompt, index * SAMPLES + sample)
        for index, prompt in enumerate(prompts.tolist())
        for sample in range(SAMPLES)
    ]
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    ids = prompts.repeat_interleave(SAMPLES, 0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

    ours, theirs = [], []
    for _ in range(turns):
        ours.append(seconds(lambda: engine.generate(requests, params)))
        theirs.append(seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)))
    tokens, parameters = len(requests) * NEW_TOKENS, engine.model.architecture.parameters() / 1e6
    print(f"{kind}, {parameters:.1f} M parameters, {tokens} tokens, {torch.get_num_threads()} threads")
    print(f"engine       {min(ours):6.2f} s   {tokens / min(ours):8.0f} tokens/s")
    print(f"transformers {min(theirs):6.2f} s   {tokens / min(theirs):8.0f} tokens/s")
    print(f"ratio        {min(theirs) / min(ours):6.2f}")


if __name__ == "__main__":
    main()
