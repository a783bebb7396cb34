"""A guided teacher, for methods that distil one: at one weight, or at all weights of a range at once.

    F_w = F_guide + w (F - F_guide)

F_guide is the teacher without classes (classifier-free guidance), or another, weaker network of the same data
(autoguidance); w = 1 is the teacher itself. Of a range, every sample has a weight of its own, which the generator
reads: whoever draws from it chooses.

Source: Ho & Salimans 2022; Karras et al. 2024 (autoguidance), eq. 3; for w as an input, Meng et al. 2023 and Lu & Song
2025 (sCM), appendix G.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import FlowFunction, Role
from edmdistill.networks.label_dropout import guidance_problem
from edmdistill.trigflow import expand

Weight = Annotated[float, Meta(ge=1)]
Range = Annotated[
    tuple[Weight, Weight],
    Meta(description="least and greatest weight of the teacher's guidance; one weight is built in, [1, 1] is none"),
]
Guide = Annotated[
    Literal["classes", "network"],
    Meta(description="what guides: the teacher without its classes, or the network that --guide names"),
]


class Guided(Protocol):
    """The options of a method whose teacher may be guided."""

    @property
    def guidance(self) -> tuple[float, float]: ...
    @property
    def guide(self) -> str: ...


def require_range(own: Guided) -> None:
    """Raises: ValueError: the weights fall, or a network is to guide with none."""
    low, high = own.guidance
    if low > high:
        raise ValueError(f"guidance = [{low:g}, {high:g}] falls: give the least weight first")
    if own.guide == "network" and high == 1:
        raise ValueError('guide = "network" does nothing at weight 1: give a range, as in guidance = [1.0, 2.0]')


def guided_roles(roles: Mapping[str, Role], own: Guided) -> dict[str, Role]:
    """The roles: those that are trained read a weight where there are several; a guide, where a network guides."""
    low, high = own.guidance
    guide = {"guide": Role(trained=False, source="guide")} if own.guide == "network" else {}
    return {name: part._replace(guided=part.trained and low < high) for name, part in roles.items()} | guide


def check_guidance(own: Guided, label_dim: int, label_dropout: float | None) -> str | None:
    """Returns why a teacher with so many classes cannot be guided so; None where it can.

    Args:
        label_dropout: share of its training in which it was given no class, in [0, 1]; None: whatever it was.
    """
    if own.guidance[1] == 1 or own.guide != "classes":
        return None
    advice = "say --set method.guide=network and name a weaker network by --guide, or --set method.guidance=[1,1]"
    if label_dim:
        advice += ", or --force-guidance"
    return guidance_problem(label_dim, 1.0 if label_dropout is None else label_dropout, advice)


class GuidedTeacher:
    """The teacher as the generator is to be: F_w.

    Args:
        networks: the teacher, and the guide if a network guides.
    """

    def __init__(self, networks: Mapping[str, FlowFunction], own: Guided) -> None:
        self.teacher, self.guide = networks["teacher"], networks.get("guide")
        self.low, self.high = own.guidance

    def weights(self, draws: Draws) -> Tensor | None:
        """Of each sample one, uniform in the range; None where there is but one.  [B] float64"""
        return None if self.low == self.high else self.low + (self.high - self.low) * draws.uniform()

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None, w: Tensor | None = None) -> Tensor:
        """F_w.  w: as from `weights`  [B]; all else as a FlowFunction's."""
        F = self.teacher(x_t, t, labels)
        if self.high == 1:
            return F
        F_guide = self.teacher(x_t, t, None) if self.guide is None else self.guide(x_t, t, labels)
        return F_guide + (self.low if w is None else expand(w, F).to(F)) * (F - F_guide)


class AtWeight:
    """A network that reads w, with w filled in: what calls it need not know."""

    def __init__(self, network: FlowFunction, w: Tensor) -> None:
        self.network, self.w = network, w

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.network(*args, w=self.w, **keywords)

    def tangent(self, *args: Any, **keywords: Any) -> Any:
        return self.network.tangent(*args, w=self.w, **keywords)


def at_weight(network: FlowFunction, w: Tensor | None) -> FlowFunction:
    """The network at these weights; None: as it is.  w [B]"""
    return network if w is None else AtWeight(network, w)
