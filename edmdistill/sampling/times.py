"""Parses and checks sampling times."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError, comma_separated
from edmdistill.trigflow import sigma_to_time


def parse_times(text: str, *, sigma_data: float, sigma_min: float, sigma_max: float) -> Tensor:
    """Reads `80,2.5` (noise levels) or `1.56rad,1.1rad` (times in radians), or both.  float64 [nfe], radians

    Raises: EdmDistillError: a part that is no number, a noise level outside [sigma_min, sigma_max], a time outside
        (0, pi/2], or one above the one before it.
    """
    times: list[float] = []
    for part in comma_separated(text, "--t"):
        try:
            value = float(part.removesuffix("rad"))
        except ValueError:
            raise EdmDistillError(
                f"--t {text}: {part!r} is not a time; write noise levels as in 80,2.5 or radians as in 1.56rad,1.1rad"
            ) from None
        if part.endswith("rad"):
            if not 0 < value <= math.pi / 2:
                raise EdmDistillError(f"--t {text}: {part} is out of range; radians are above 0 and at most pi/2")
        else:
            if not sigma_min <= value <= sigma_max:
                raise EdmDistillError(
                    f"--t {text}: noise level {part} is out of range; this network takes {sigma_min:g} to {sigma_max:g}"
                )
            value = float(sigma_to_time(value, sigma_data))
        if times and value > times[-1]:
            raise EdmDistillError(f"--t {text}: noise levels must decrease, but {part} is above the one before it")
        times.append(value)
    return torch.tensor(times, dtype=torch.float64)


def check_times(times: Tensor | Sequence[float]) -> Tensor:
    """Returns sampling times once checked: radians in (0, pi/2], falling, may repeat.  float64 [steps]

    Raises: EdmDistillError: they are not such times.
    """
    times = torch.as_tensor(times, dtype=torch.float64)
    shown = ", ".join(f"{t:.4g}" for t in times.flatten().tolist())
    if times.ndim != 1 or not len(times):
        raise EdmDistillError("sampling times must be a list of at least one time")
    if not bool(((times > 0) & (times <= math.pi / 2)).all()):
        raise EdmDistillError(
            f"sampling times are radians in (0, pi/2], but these are {shown}; "
            "edmdistill.trigflow.sigma_to_time makes them of noise levels"
        )
    if bool((times.diff() > 0).any()):
        raise EdmDistillError(f"sampling times must decrease from noise to data, but these increase: {shown} (radians)")
    return times
