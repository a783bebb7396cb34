"""Options of a run that measure a GPU, and so need one."""

from __future__ import annotations

import torch

from edmdistill.errors import TrainingError
from edmdistill.transfer import is_gpu

NEED_GPU = {"--micro-batch auto": "use a number of images", "--fit auto": "name the memory, as in --fit 12GB"}
"""What to do on a CPU instead, by the option as it is typed."""


def require_gpu(device: torch.device, option: str) -> None:
    """Raises: TrainingError: one of NEED_GPU is given for a run on the CPU."""
    if not is_gpu(device):
        raise TrainingError(f"{option} needs a GPU, but this run is on the CPU: {NEED_GPU[option]}")
