"""One of several processes: compute GRPO's gradient under several parallel layouts, saved as checkpoints."""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from milepost.checkpoints import mapping, torch_dist
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.configuration.schema import Parallel
from milepost.grpo.aggregations import StepTotals
from milepost.grpo.cpu_optimizer import CpuAdam
from milepost.grpo.learner import Learner
from milepost.grpo.policy import Policy
from milepost.grpo.run_state import Progress
from milepost.grpo.samples import TrainingSequence
from milepost.qwen3_5.architecture import Architecture
from milepost.qwen3_5.build import build_model, initialize
from precision import computing_in
from settings import section, training_settings

SHAPES = [(12, 9), (2, 88), (12, 3), (30, 1), (30, 20), (12, 33)]
EVEN_SHAPES = [(12, 8), (2, 70), (30, 22)]  # which no layout pads
LAYOUTS = {
    "dense": [Parallel(), Parallel(tensor=2), Parallel(tensor=2, sequence=False), Parallel(context=2)],
    "moe": [Parallel(), Parallel(expert=2), Parallel(tensor=2), Parallel(tensor=2, expert=2)],
    # Both sum over whole responses, which context-parallel ranks share.
    "gspo dense": [Parallel(), Parallel(context=2)],
    "corrected dense": [Parallel(context=2)],
    # The auxiliary loss is computed per pack, so all sequences are in one.
    "balanced moe": [Parallel(tensor=2), Parallel(context=2)],
}
ALGORITHMS = {
    "gspo dense": {"loss": "gspo", "old_log_probs": "engine"},
    "corrected dense": {"correction": "sequence_truncate", "correction_bounds": [0.0, 1e9]},
}


def sequences(architecture: Architecture, shapes: list[tuple[int, int]]) -> list[TrainingSequence]:
    """Random responses to prompts, which are equal if of equal length, and random experts to visit."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(280, (30,), generator=generator)
    return [
        TrainingSequence(
            ids=torch.cat([prompts[:prompt], torch.randint(280, (response,), generator=generator)]),
            log_probs=math.log(1 / 280) + 0.1 * torch.randn(response, generator=generator),
            advantage=0.5 - index,
            routing=random_experts(architecture, prompt + response, generator) if architecture.is_moe else None,
        )
        for index, (prompt, response) in enumerate(shapes)
    ]


def random_experts(architecture: Architecture, tokens: int, generator: torch.Generator) -> torch.Tensor:
    scores = torch.rand(tokens, architecture.num_layers, architecture.num_experts, generator=generator)
    return scores.topk(architecture.experts_per_token).indices.flatten(1)


def shapes_of(kind: str) -> list[tuple[int, int]]:
    return EVEN_SHAPES if kind == "balanced moe" else SHAPES


def save_gradients(
    hub_folder: Path, kind: str, parallel: Parallel, folder: Path, dtype: torch.dtype = torch.float64
) -> None:
    """Learn from the sequences; save the gradients in place of the weights, and the metrics."""
    initialize(parallel)
    balanced, shapes = kind == "balanced moe", shapes_of(kind)
    experts = section("experts", dispatcher="alltoall", aux_loss_coefficient=0.1 if balanced else 0.0)
    architecture, hub = Architecture.from_folder(hub_folder), HubCheckpoint(hub_folder)
    batch = sequences(architecture, shapes)
    settings = training_settings(
        training={
            "prompts_per_rollout": 1,
            "samples_per_prompt": len(shapes),
            "global_batch": len(shapes),
            "max_tokens_per_gpu": 1000 if balanced else 90,
            "log_prob_chunk": 16,
        },
        algorithm={"entropy_coefficient": 0.1, "kl_coefficient": 0.1, **ALGORITHMS.get(kind, {})},
        optimizer={"learning_rate": 0.0, "clip_gradient_norm": 0.0},
        mtp={"train": architecture.is_moe},  # without it prompts share their rows
        sampling={"temperature": 0.7},
        engine={"replay_routing": architecture.is_moe},
    )
    with computing_in(dtype):
        model = build_model(architecture, parallel, dtype=dtype, mtp_num_layers=1, experts=experts)
    mapping.from_hub(model, architecture, hub)
    with computing_in(dtype):
        policy = Policy(model, settings)
        learner = Learner(policy, CpuAdam(model, settings.optimizer), settings)
        metrics = learner.learn(batch, Progress())
    packs = policy.micro_batches(batch, StepTotals(len(shapes), sum(map(sum, shapes)), 1))
    if kind in ALGORITHMS and parallel.context > 1:
        shared = [(r.counts > 0) & (r.counts < r.lengths) for r in (pack.tokens.responses for pack in packs)]
        assert torch.cat(shared).any(), "no rank has a part of a response, so sums over responses are not tried"
    for name, parameter in model.named_parameters():
        parameter.data.copy_(learner.optimizer.gradients[name])
    torch_dist.save(model, folder)
    if dist.get_rank() == 0:
        folder.with_suffix(".json").write_text(json.dumps(metrics | {"packs": len(packs)}))
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    work = Path(sys.argv[1])
    for kind, layouts in LAYOUTS.items():
        for number, layout in enumerate(layouts):
            save_gradients(work / kind.split()[-1], kind, layout, work / kind / f"layout-{number}")
    dist.destroy_process_group()
