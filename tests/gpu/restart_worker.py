"""One of two processes, each with a server on its GPU; the second is restarted, and its memory is measured."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gpu.sglang_arguments import ARGUMENTS
from milepost.checkpoints.safetensors_io import HubCheckpoint
from milepost.grpo.loop import from_rank_0
from milepost.qwen3_5.build import finalize, initialize
from milepost.rollout.engine import Request, SamplingParams, share_weights, start_engine
from milepost.rollout.sglang_weights import BUCKET_BYTES
from settings import section

RESTARTS = 2
PARAMS = SamplingParams(max_new_tokens=8)
SETTINGS = section("engine", mem_fraction_static=0.15, server_arguments=ARGUMENTS)


def main(folder: Path) -> None:
    initialize()
    hub = HubCheckpoint(folder)
    weights = {name: hub.read(name).cuda() for name in hub}
    engine = start_engine(folder, SETTINGS, folder / "logs") if dist.get_rank() == 0 else None
    held = []

    def send() -> None:
        if engine:
            engine.load_weights(weights.items())
        else:
            share_weights(folder, SETTINGS, weights.items())
        torch.cuda.ipc_collect()
        held.append(torch.cuda.memory_allocated())

    def wanted() -> None:
        from_rank_0("more")
        send()

    send()
    if engine:
        engine.weights_wanted = wanted
        for _ in range(RESTARTS):
            engine.servers[1].kill()
            for _ in range(2):  # the other server finishes before the restart does, so the next batch waits for it
                answers = engine.generate([Request([1, 2, 3], seed) for seed in range(8)], PARAMS)
            assert all(len(answer.token_ids) == 8 for answer in answers)
        from_rank_0("enough")
        engine.close()
    else:
        while from_rank_0(None) == "more":
            send()
    print(f"rank {dist.get_rank()}: bytes after each time that weights were sent: {held}", flush=True)
    assert len(held) == 1 + RESTARTS
    assert max(held) - held[0] < BUCKET_BYTES / 2
    finalize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
