"""Rendezvous of a run's processes on one machine, through private files and the loopback interface.

torch's usual TCPStore listens on every interface and accepts writes from anyone, and some of its readers unpickle what
they find. A FileStore in a folder of mode 0700 does the same but is accessible only to this user.
"""

import os

import torch.distributed as dist

from milepost.common.errors import LAUNCH, UserError

# The interface on which gloo and NCCL listen; by default they take the first network interface.
INTERFACE = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def rendezvous(number: int) -> tuple[dist.Store, int, int]:
    """Return (store, rank, world size) for `torch.distributed.init_process_group`.

    Args:
        number: how many groups this process has joined before, since a store must never be reused.

    Raises:
        UserError: another launcher started this process as one of several.
    """
    rank, world = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))
    if LAUNCH not in os.environ:
        if world > 1:
            raise UserError(
                "started by another launcher: use `python -m milepost.launch.torchrun` for several processes"
            )
        return dist.HashStore(), 0, 1
    return dist.FileStore(os.path.join(os.environ[LAUNCH], f"group-{number}"), world), rank, world
