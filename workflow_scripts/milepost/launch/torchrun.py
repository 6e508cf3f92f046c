"""torchrun for a single machine that opens no port and gives processes time to save themselves when interrupted.

    python -P -m milepost.launch.torchrun --standalone --nproc-per-node=8 train.py ...

torchrun's rendezvous opens two TCPStores on all interfaces, without authentication. A single launcher needs no
rendezvous: `OneMachine` replaces it, and the processes find each other through files (see `common.loopback`).

torchrun forwards SIGTERM and SIGINT to its processes and kills them 30 seconds later, but a training needs minutes to
save itself. Here only a second signal starts that timeout. If a process fails, the others still get only 30 seconds.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher import api

from milepost.common.errors import ERROR_FILE, LAUNCH, end
from milepost.common.interrupts import ECHO_SECONDS

PATIENCE = 24 * 60 * 60  # seconds
ENDED_BY = {"SIGKILL": "unless someone killed it, the machine ran out of memory; run again"}


class PatientAgent(LocalElasticAgent):
    """Starts this machine's processes, and waits for them to save themselves after a signal."""

    def _shutdown(self, death_sig: signal.Signals | None = None) -> None:
        if death_sig is not None and self._pcontext:  # otherwise a process has failed, or all have ended
            _ignore_echoes()
            self._pcontext.close(death_sig, timeout=PATIENCE)
        super()._shutdown()


def _ignore_echoes() -> None:
    """Ignore further signals for a few seconds: one Ctrl-C may arrive from both the terminal and Snakemake."""
    began = time.monotonic()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - began > ECHO_SECONDS:
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, handle)


class OneMachine(RendezvousHandler):
    """The rendezvous of a single launcher: an in-memory store."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def get_backend(self) -> str:
        return "one-machine"

    def get_run_id(self) -> str:
        return self.run_id

    def next_rendezvous(self) -> RendezvousInfo:
        # Nothing listens at this address; the processes meet in a folder instead.
        nowhere = RendezvousStoreInfo(master_addr="127.0.0.1", master_port=0)
        return RendezvousInfo(dist.HashStore(), rank=0, world_size=1, bootstrap_store_info=nowhere)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing to do: no other launcher can join."""

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


def main(arguments: list[str]) -> None:
    """Run torchrun with ``arguments``."""
    api.LocalElasticAgent = PatientAgent
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a failing process reports its own error
    rendezvous_handler_registry.register("one-machine", lambda parameters: OneMachine(parameters.run_id))
    arguments = [argument for argument in arguments if argument != "--standalone"]  # it would select torch's rendezvous
    with tempfile.TemporaryDirectory(prefix="milepost-") as folder:
        os.environ[LAUNCH] = folder
        try:
            run.main(["--nnodes=1", "--rdzv-backend=one-machine", *arguments])
        except ChildFailedError as error:
            error_file = Path(folder, ERROR_FILE)
            if error_file.exists():
                end(error_file.read_text())
            sys.exit(_ending(*error.get_first_failure()))


def _ending(rank: int, failure: ProcessFailure) -> int | str:
    """The exit status after a process failed; a message if a signal killed it, since then it reported nothing."""
    if failure.exitcode >= 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    return f"error: the process of rank {rank} was killed by {name}: {ENDED_BY.get(name, 'run again')}"


if __name__ == "__main__":
    main(sys.argv[1:])
