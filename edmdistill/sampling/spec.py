"""How images are drawn from a network: one record, built by commands and taken by sampling, evaluation and exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from msgspec import UNSET, Struct, UnsetType
from torch import Tensor

from edmdistill.arguments import require_fields
from edmdistill.errors import EdmDistillError
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.dpm_solver import ddim_sampler, dpm_solver_2s, dpm_solver_pp_2m
from edmdistill.sampling.heun import Churn, edm_sampler
from edmdistill.sampling.multistep import ipndm_sampler, unipc_sampler
from edmdistill.sampling.times import check_times
from edmdistill.sampling.trajectory import ReferenceGuidance

MAX_NFE = 10_000
"""More evaluations than any schedule has a use for; a mistyped number would fill the memory with noise levels."""
MAX_GUIDANCE = 1000.0


class Solver(NamedTuple):
    """A solver of a teacher's ODE.

    Attributes:
        name: as users type it.
        calls_per_step: of the denoiser; the last step takes one.
        multistep: it looks back at earlier steps, none of which may be of length 0.
    """

    name: str
    sampler: Callable[..., Tensor]
    calls_per_step: int
    multistep: bool = False

    def nfe(self, num_steps: int) -> int:
        """Returns the network evaluations of so many steps."""
        return self.calls_per_step * (num_steps - 1) + 1

    def num_steps(self, nfe: int) -> int:
        """Returns the number of steps that take so many network evaluations.

        Raises: EdmDistillError: no number of steps does.
        """
        if self.calls_per_step == 2 and nfe % 2 == 0:
            raise EdmDistillError(
                f"the solver {self.name} takes an odd number of network evaluations, 2n - 1 for n steps, but nfe is "
                f"{nfe}: use {nfe - 1} or {nfe + 1}"
            )
        return (nfe - 1) // self.calls_per_step + 1


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("heun", edm_sampler, 2),
        Solver("ddim", ddim_sampler, 1),
        Solver("dpm-solver-2s", dpm_solver_2s, 2),
        Solver("dpm-solver++2m", dpm_solver_pp_2m, 1, multistep=True),
        Solver("ipndm", ipndm_sampler, 1, multistep=True),
        Solver("unipc", unipc_sampler, 1, multistep=True),
    )
}
"""How teachers are sampled, by name."""


class SamplerRecord(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How images were drawn, with all defaults filled in, as results store it."""

    solver: str
    """gamma for a generator, one of SOLVERS for a teacher, reference with a reference; rk45 for a likelihood."""
    nfe: int
    """For a likelihood, the mean over the images, rounded."""
    gamma: float | None = None
    sigmas: tuple[float, ...] | None = None
    """Noise levels; None: a teacher's grid, which follows from nfe."""
    guidance: float = 1.0
    guide: str | UnsetType = UNSET
    """The sha256 of the network to guide away from; absent: the network itself without classes, or none."""
    churn: tuple[float, float, float, float] | None = None
    """A teacher's S_churn, S_min, S_max and S_noise; None: it is sampled without fresh noise."""
    dtype: str = "float32"
    """The dtype of the network's arithmetic; tf32: float32 with products in TF32."""


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """How to draw images from a network; None stands for the network's own default.

    Attributes:
        nfe: network evaluations for an image; default: 2 for a generator, or the fewest that it has a schedule for;
            35 for a teacher, 63 for one of EDM2. Odd for a solver that takes two evaluations a step; guidance, which
            calls a second network, does not count.
        gamma: share of fresh noise between a generator's steps, in [0, 1]; see gamma_sampler.
        times: noise levels as times in radians, falling, one a step; default: a generator's schedule for nfe steps, and
            a teacher's grid of the official sampler.
        guidance: weight of a teacher's guidance, see GuidedDenoiser, or one in the range that a generator was trained
            for. 1 = none, 0 = the guide alone, at most 1000; default: 1, or the lower end of a generator's range.
        guide: the network to guide away from; default: the teacher without labels, if it was trained for that.
        force_guidance: let a teacher guide itself that was never trained without labels.
        solver: a key of SOLVERS, for a teacher or a generator of CTM; default for a teacher: heun.
        churn: fresh noise in Heun's method; see Churn.
        reference: an image that every sample starts from and is pulled toward, by teacher or generator, at `times` and
            with a gamma below 1; default: paper_sigmas and 0; see reference_sampler.
    Raises: EdmDistillError: a value out of range, or two options that exclude each other.
    """

    nfe: int | None = None
    gamma: float | None = None
    times: Sequence[float] | Tensor | None = None
    guidance: float | None = None
    guide: Denoiser | None = None
    force_guidance: bool = False
    solver: str | None = None
    churn: Churn = Churn()
    reference: ReferenceGuidance | None = None

    @classmethod
    def of_arguments(cls, arguments: Mapping[str, Any]) -> SamplerSpec:
        """Returns the spec of a function's arguments, by name; those that are no fields of it are left out."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def companions(self) -> list[Denoiser]:
        """Returns the networks that are called beside the one that is sampled."""
        score = None if self.reference is None else self.reference.score
        return [network for network in (self.guide, score) if network is not None]

    def __post_init__(self) -> None:
        require_fields(self)
        if self.nfe is not None and not 1 <= self.nfe <= MAX_NFE:
            raise EdmDistillError(
                f"the number of network evaluations must be a whole one, 1 to {MAX_NFE:,}, but it is {self.nfe:,}"
            )
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise EdmDistillError(f"gamma, the share of fresh noise, must be in [0, 1], but it is {self.gamma:g}")
        if self.times is not None:
            object.__setattr__(self, "times", tuple(check_times(self.times).tolist()))
        if self.solver is not None and self.solver not in SOLVERS:
            raise EdmDistillError(f"there is no solver {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        if self.solver not in (None, "heun") and self.churn != Churn():
            raise EdmDistillError(
                f"churn is part of Heun's method, and {self.solver} has none: leave out one of the two"
            )
        if self.churn.strength == 0 and self.churn != Churn():
            raise EdmDistillError("S_min, S_max and S_noise need churn, which is 0: raise it, or leave them out")
        if self.force_guidance and (self.guide is not None or self.guidance in (None, 1)):
            raise EdmDistillError(
                "force_guidance lets a teacher guide itself at a guidance other than 1, which is not requested here: "
                "leave it out"
            )
        if self.reference is not None:
            if (self.nfe, self.guide, self.solver, self.churn) != (None, None, None, Churn()):
                raise EdmDistillError("nfe, guide, solver and churn have no effect with a reference: leave them out")
            if self.gamma == 1:
                raise EdmDistillError("with a reference, gamma must be in [0, 1), but it is 1")
