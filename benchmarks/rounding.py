"""Measure how much bf16 rounding changes a random model's log-probs from fp32: a bound for any two programs.

A model of the recipe's depth, 512 wide, with random_checkpoint.py's weights, runs in both dtypes on the CPU. With
``--stream 0.02`` its embeddings are so small that the layers overwrite them, as in most random initializations.

    PYTHONPATH=workflow_scripts python benchmarks/rounding.py 4B 27B 35B_A3B
    PYTHONPATH=workflow_scripts python benchmarks/rounding.py 35B_A3B --stream 0.02
"""

import argparse
import tempfile
from pathlib import Path

import torch
from random_checkpoint import ROOT, write_checkpoint
from record import record
from torch import Tensor

from milepost.checkpoints import mapping
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.configuration.layers import read_yaml
from milepost.configuration.schema import Architecture as Shape
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, finalize, initialize
from milepost.qwen3_5.model import hidden_states, output_weight
from milepost.qwen3_5.packed import pack

WIDTH = 512
TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--stream", type=float, default=1.0, help="size of the embeddings")
    arguments = parser.parse_args()
    initialize()
    for name in arguments.models:
        shape = Shape.model_validate(read_yaml(ROOT / "config" / "models" / f"{name}.yaml")["architecture"])
        narrow = {"hidden": WIDTH, "ffn": shape.ffn * WIDTH // shape.hidden}
        if shape.shared_expert_ffn:
            narrow["shared_expert_ffn"] = shape.shared_expert_ffn * WIDTH // shape.hidden
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), shape.model_copy(update=narrow), 2**31, seed=0)
            exact, rounded = (
                log_probs(Path(folder), dtype, arguments.stream) for dtype in (torch.float32, torch.bfloat16)
            )
        sampled = torch.multinomial(rounded.exp(), 1, generator=torch.Generator().manual_seed(0))
        far = (exact.gather(1, sampled) - rounded.gather(1, sampled)).abs().mean().item()
        entropy = -(exact.exp() * exact).sum(-1).mean().item()
        note = {"layers": shape.layers, "width": WIDTH, "tokens": TOKENS, "stream": arguments.stream}
        record("bf16_log_prob_diff", name, far, "nats", file="rounding", entropy=round(entropy, 2), **note)
    finalize()


@torch.no_grad()
def log_probs(folder: Path, dtype: torch.dtype, stream: float) -> Tensor:
    """Log-probs of every next token (tokens, vocabulary), in fp32 from the final hidden states on."""
    architecture = Architecture.from_folder(folder)
    model = build_model(architecture, dtype=dtype)
    mapping.from_hub(model, architecture, HubCheckpoint(folder))
    model.embedding.word_embeddings.weight.mul_(stream)
    row = torch.randint(architecture.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(1))
    hidden = hidden_states(model, *pack([row]))
    return (hidden.float().view(-1, WIDTH) @ output_weight(model).float().T).log_softmax(-1)


if __name__ == "__main__":
    main()
