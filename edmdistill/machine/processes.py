"""The processes of one command, which share files and wait for one another."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from edmdistill.errors import PeerFailed
from edmdistill.machine.launch import process_rank

PATIENCE = timedelta(days=7)
"""The main process may reduce for hours what all have measured; NCCL's ten minutes would end the others meanwhile."""


class ProcessGroup:
    """The processes of a command, seen from one of them, as evaluation.shards has them. They talk by gloo, on the CPU.

    To be made after `init_from_environment`, in a world of several processes.

    Attributes:
        rank, world_size: the index of this process, and the number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = process_rank()
        dist.init_process_group("gloo", rank=self.rank, world_size=self.world_size, timeout=PATIENCE)

    def any_process(self, flag: bool) -> bool:
        """Returns whether the flag is set on any process, after all have called it.

        Raises: PeerFailed: another process has died.
        """
        return bool(self.all_reduce(torch.tensor(float(flag))))

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor on the CPU over all processes, after all have called it.

        Raises: PeerFailed: another process has died.
        """
        total = tensor.clone()
        try:
            dist.all_reduce(total)
        except RuntimeError as error:
            raise PeerFailed("another process has died") from error
        return total

    def close(self) -> None:
        end_process_group()


def end_process_group() -> None:
    """Destroys the process group, if there is one: else processes can hang when they exit."""
    if dist.is_initialized():
        # Gloo's thread frees its last work in Python; without a moment to do so, it hangs or aborts at exit.
        time.sleep(0.1)
        dist.destroy_process_group()
