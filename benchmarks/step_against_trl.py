"""Time a GRPO step on the CPU: Milepost against TRL's GRPOTrainer, same checkpoint, prompts, samples and lengths.

    envs/setup.sh peers && PYTHONPATH=workflow_scripts:tests .venv-peers/bin/python benchmarks/step_against_trl.py

Both train a random 8-layer model on the same 32 prompts x 8 samples of up to 24 tokens. The reward is a fixed function
of the text, so that rewards differ within every group and no sample is dropped. The first step of each is not counted.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import record
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, TrainerCallback
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM

import grpo_run

PROMPTS, SAMPLES, NEW_TOKENS, LEARNING_RATE = 32, 8, 24, 1e-4


def milepost(folder: Path, steps: int) -> list[float]:
    """Seconds of each whole step: rollout, reward, training, weight sync."""
    grpo_run.convert_model(folder)
    changes = {
        "training": {
            "prompts_per_rollout": PROMPTS,
            "samples_per_prompt": SAMPLES,
            "global_batch": PROMPTS * SAMPLES,
            "rollouts": steps,
            "max_tokens_per_gpu": 16384,
            "save_interval": steps,
        },
        "validation": {"interval": 0},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "sampling": {"max_response_tokens": NEW_TOKENS},
    }
    grpo_run.run(grpo_run.arguments(folder, folder / "work", **changes))
    rows = [json.loads(line) for line in (folder / "work/metrics.jsonl").open()]
    return [row["seconds_step"] for row in rows if "seconds_step" in row]


def trl(folder: Path, steps: int) -> list[float]:
    """Seconds of each step of GRPOTrainer on the same text weights."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    hub = folder / "hub"
    model = Qwen3_5ForCausalLM(AutoConfig.from_pretrained(hub).text_config).float()
    weights = {k: v for file in hub.glob("*.safetensors") for k, v in load_file(file).items()}
    prefix = "model.language_model."
    text = {f"model.{k.removeprefix(prefix)}": v.float() for k, v in weights.items() if k.startswith(prefix)}
    missing = [name for name in model.load_state_dict(text, strict=False).missing_keys if name != "lm_head.weight"]
    if missing:
        sys.exit(f"the checkpoint lacks {missing}")
    rows = [json.loads(line) for line in (folder / "train/rows.jsonl").open()]
    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.began)

    def reward(completions, **_):
        return [float(sum(map(ord, completion[0]["content"])) % 2 == 0) for completion in completions]

    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="grpo",
        scale_rewards="group",
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(hub),
        callbacks=[Clock()],
    ).train()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as temporary:
        folder = grpo_run.prepare(Path(temporary), layers=8, hidden=256, head_dim=64, rows=256)
        parameters = sum(tensor.numel() for tensor in load_file(next((folder / "hub").glob("*.safetensors"))).values())
        theirs, ours = statistics.median(trl(folder, steps)[1:]), statistics.median(milepost(folder, steps)[1:])
    shape = {"threads": torch.get_num_threads(), "checkpoint_parameters": parameters, "samples": PROMPTS * SAMPLES}
    shape["new_tokens"] = NEW_TOKENS
    record("step_seconds", "tiny 8x256", ours, "s", file="step_against_trl", engine="milepost", **shape)
    record("step_seconds", "tiny 8x256", theirs, "s", file="step_against_trl", engine="trl 1.16.0", **shape)
    record("step_speedup_over_trl", "tiny 8x256", theirs / ours, "x", file="step_against_trl", **shape)


if __name__ == "__main__":
    main()
