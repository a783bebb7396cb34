"""Distances between images, one for each sample.  a, b [B,C,H,W] -> [B]

They are means over pixels, so their scale does not depend on the resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Protocol

from msgspec import Meta
from torch import Tensor

from edmdistill.features.perceptual import PerceptualDistance
from edmdistill.methods.base import Role


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Returns the mean squared difference."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.00054) -> Tensor:
    """Returns sqrt(mean squared difference + c^2) - c: the root mean square, but smooth at 0.

    Source: Song & Dhariwal 2023 (iCT), eq. 8, where c = .00054 sqrt(D).  Differs: divided by sqrt(D).
    """
    return (l2(a, b) + c**2).sqrt() - c


DISTANCES = {"l2": l2, "pseudo-huber": pseudo_huber}
Distance = Annotated[
    Literal["pseudo-huber", "l2", "lpips"], Meta(description="distance between the generator's image and its target")
]
PerceptionFile = Annotated[str, Meta(description="TorchScript file of the distance lpips; see PerceptualDistance")]


class DistanceConfig(Protocol):
    """The options of a method that compares images."""

    @property
    def distance(self) -> str: ...
    @property
    def lpips(self) -> str: ...


def check_distance(config: DistanceConfig) -> None:
    """Raises: ValueError: lpips has no file, or its file is named in vain."""
    if (config.distance == "lpips") != bool(config.lpips):
        raise ValueError('distance = "lpips" and lpips = FILE go together: set both or neither')


def distance_of(config: DistanceConfig, networks: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the distance of the options; networks: of `perception_roles`, by role."""
    return networks["perception"] if config.lpips else DISTANCES[config.distance]


def perception_roles(lpips: str) -> dict[str, Role]:
    """Returns the role of a perceptual distance; none for "".  lpips: its TorchScript file, see PerceptualDistance."""
    if not lpips:
        return {}
    return {"perception": Role(trained=False, make=lambda flow, seed: PerceptualDistance(lpips))}
