"""torchrun, but patient with processes that it was asked to end: a training needs minutes to save itself.

torchrun passes SIGTERM and SIGINT on to its processes and kills what is left of them 30 seconds later. Here only a
second signal starts that clock. Where a process fails, the others still have no more than the 30 seconds.

    python -m torchrun --standalone --nproc-per-node=8 -m train ...
"""

import signal
import time
from types import FrameType

from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.launcher import api

from common.interrupts import ECHO_SECONDS

PATIENCE = 24 * 60 * 60  # seconds


class PatientAgent(LocalElasticAgent):
    """Starts and ends the processes of this node."""

    def _shutdown(self, death_sig: signal.Signals | None = None) -> None:
        if death_sig is not None and self._pcontext:  # otherwise one of the processes has failed, or all have ended
            _ignore_echoes()
            self._pcontext.close(death_sig, timeout=PATIENCE)
        super()._shutdown()


def _ignore_echoes() -> None:
    """One Ctrl-C may come from the terminal and from Snakemake: heed no other signal in the next few seconds."""
    began = time.monotonic()
    heed = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: FrameType | None) -> None:
        if time.monotonic() - began > ECHO_SECONDS:
            heed[number](number, frame)

    for number in heed:
        signal.signal(number, handle)


if __name__ == "__main__":
    api.LocalElasticAgent = PatientAgent
    run.main()
