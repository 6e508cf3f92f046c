"""How the processes of a run find each other on one machine: through private files and the loopback interface.

torch's TCPStore, by which processes usually meet, listens on every interface, takes whatever anybody writes into it,
and some of its readers unpickle what they find. A FileStore in a folder of mode 0700 does the same job in the open to
this user alone.
"""

import os

import torch.distributed as dist

from milepost.common.errors import LAUNCH, UserError

# What gloo and NCCL listen on. They would take the first interface that looks like a network.
INTERFACE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def rendezvous(number: int) -> tuple[dist.Store, int, int]:
    """Return (store, rank, world size) for `torch.distributed.init_process_group`.

    Args:
        number: how many groups this process has joined before: a store must never be used twice.

    Raises:
        UserError: another launcher started this process as one of several.
    """
    rank, world = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
    if LAUNCH not in os.environ:
        if world > 1:
            raise UserError("start several processes with `python -m milepost.launch.torchrun`, the pipeline's own")
        return dist.HashStore(), 0, 1
    return dist.FileStore(os.path.join(os.environ[LAUNCH], f"group-{number}"), world), rank, world
