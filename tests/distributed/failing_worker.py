"""One of several training processes (see tests/grpo_run.py), some without room for the first checkpoint."""

import sys

import torch.distributed as dist

import grpo_run
from milepost.common.errors import UserError
from milepost.grpo import run_state

FAILING = [int(rank) for rank in sys.argv[1].split(",")]
save = run_state.save


def save_or_fail(*arguments):
    if dist.get_rank() in FAILING:
        raise UserError(f"rank {dist.get_rank()}: no room")
    return save(*arguments)


if __name__ == "__main__":
    run_state.save = save_or_fail
    grpo_run.run(sys.argv[2:])
