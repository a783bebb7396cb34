"""A guided teacher for distillation, at one guidance weight or at all weights of a range.

    F_w = F_guide + w (F - F_guide)

F_guide is the teacher without labels (classifier-free guidance) or a weaker network of the same data (autoguidance);
w = 1 is the teacher itself. With a range, each sample has its own w, an input of the generator, so that w can be chosen
at sampling.

Source: Ho & Salimans 2022; Karras et al. 2024 (autoguidance), eq. 3; for w as an input, Meng et al. 2023 and Lu & Song
2025 (sCM), appendix G.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, TypeVar

from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.base import FlowFunction, Method, NoiseRange, Role
from edmdistill.networks.label_dropout import guidance_problem
from edmdistill.trigflow import expand

GuidanceWeight = Annotated[float, Meta(ge=1)]
GuidanceRange = Annotated[
    tuple[GuidanceWeight, GuidanceWeight],
    Meta(description="range of the teacher's guidance weight; equal ends fix the weight, [1, 1] is no guidance"),
]
GuideKind = Annotated[
    Literal["classes", "network"],
    Meta(description="what guides: the teacher without labels, or the network given by --guide"),
]


class GuidanceConfig(Protocol):
    """The options of a method whose teacher can be guided."""

    @property
    def guidance(self) -> tuple[float, float]: ...
    @property
    def guide(self) -> str: ...


GuidanceConfigT = TypeVar("GuidanceConfigT", bound=GuidanceConfig)


def check_range(config: GuidanceConfig) -> None:
    """Raises: ValueError: the range decreases, or a guide network is given without guidance."""
    low, high = config.guidance
    if low > high:
        raise ValueError(f"guidance = [{low:g}, {high:g}] decreases: give the lower weight first")
    if config.guide == "network" and high == 1:
        raise ValueError('guide = "network" has no effect at weight 1: give a range, as in guidance = [1.0, 2.0]')


def guided_roles(roles: Mapping[str, Role], config: GuidanceConfig) -> dict[str, Role]:
    """Returns the roles, with w as an input of those trained if there is a range, and with the guide network if any."""
    low, high = config.guidance
    guide = {"guide": Role(trained=False, source="guide")} if config.guide == "network" else {}
    return {name: role._replace(guided=role.trained and low < high) for name, role in roles.items()} | guide


class GuidedTeacher:
    """The teacher with guidance, F_w.

    Args:
        networks: the teacher, and the guide network if there is one.
    """

    def __init__(self, networks: Mapping[str, FlowFunction], config: GuidanceConfig) -> None:
        self.teacher, self.guide = networks["teacher"], networks.get("guide")
        self.low, self.high = config.guidance

    def weights(self, draws: Draws) -> Tensor | None:
        """Draws w for each sample, uniformly from the range; None if the weight is fixed.  [B] float64"""
        return None if self.low == self.high else self.low + (self.high - self.low) * draws.uniform()

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None, w: Tensor | None = None) -> Tensor:
        """Returns F_w.  w: from `weights`  [B]; the rest as for a FlowFunction."""
        F = self.teacher(x_t, t, labels)
        if self.high == 1:
            return F
        F_guide = self.teacher(x_t, t, None) if self.guide is None else self.guide(x_t, t, labels)
        return F_guide + (self.low if w is None else expand(w, F).to(F)) * (F - F_guide)


class GuidedMethod(Method[GuidanceConfigT]):
    """A method that distills a guided teacher."""

    def __init__(self, config: GuidanceConfigT, networks: Mapping[str, Any], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.teacher = GuidedTeacher(networks, config)

    @classmethod
    def roles_for(cls, config: GuidanceConfigT) -> dict[str, Role]:
        return guided_roles(cls.roles, config)

    @classmethod
    def check_teacher(
        cls, config: GuidanceConfigT, *, positional_time: bool, label_dim: int, label_dropout: float | None
    ) -> str | None:
        if config.guidance[1] == 1 or config.guide != "classes":
            return None
        advice = "use --set method.guide=network with a weaker network as --guide, or --set 'method.guidance=[1,1]'"
        if label_dim:
            advice += ", or --force-guidance"
        return guidance_problem(label_dim, 1.0 if label_dropout is None else label_dropout, advice)

    @classmethod
    def guidance(cls, config: GuidanceConfigT) -> tuple[float, float]:
        return config.guidance
