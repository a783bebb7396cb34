"""The options of CoSIM."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from edmdistill.defaults import refuse_idle
from edmdistill.methods.adversarial import GANConfig
from edmdistill.methods.base import SecondGain
from edmdistill.methods.score_distillation import AuxiliaryTurns
from edmdistill.methods.semi_implicit import Alpha, Weight
from edmdistill.methods.trajectories import TrajectorySteps, TrajectoryStride, TrajectoryWeight, WarmupImages


class CoSIMConfig(GANConfig, frozen=True, forbid_unknown_fields=True):
    """The defaults are the paper's.

    gradient = "kl", fisher_sigma, order = "t", anchor_sigma and the trajectories are not in the paper; docs/cosim.md
    says what they are for.

    Differs: the paper requires lambda >= 0 in coef = alpha (1 + lambda), but trains alpha 1.2 with coef 1; its
    eq. 12 defines another lambda, 2 coef - 1. The losses depend on alpha and coef only, so these are the options.
    """

    alpha: Alpha = 1.2
    coef: Annotated[float, Meta(gt=0, description="pull of the auxiliary score toward the teacher; .5 = none")] = 1.0
    R: Annotated[
        int, Meta(ge=1, le=100_000, description="largest divisor of a jump; a higher R gives more small jumps")
    ] = 4
    share_to_max: Annotated[float, Meta(ge=0, le=1, description="share of jumps that start at sigma_max")] = 0.5
    r_s_max: Annotated[float, Meta(gt=0, le=1, description="upper end of s, as r of EDM's curve; 1 = sigma_max")] = 1.0
    weight: Weight = "sid"
    gradient: Annotated[
        Literal["fisher", "kl"],
        Meta(description="the generator's: fisher, through both scores; kl, their difference itself, as in DMD"),
    ] = "fisher"
    fisher_sigma: Annotated[
        float, Meta(ge=0, description="with gradient = kl: it is fisher at s from this noise level on; 0 = nowhere")
    ] = 0.0
    s_power: Annotated[float, Meta(ge=0, le=4, description="power of sin(s) in the weight of the gradient kl")] = 1.0
    order: Annotated[
        Literal["s", "t"], Meta(description="drawn first: s, or t with s uniform below it, whatever R and r_s_max")
    ] = "s"
    t_gain: SecondGain = 0.0
    anchor_sigma: Annotated[
        float,
        Meta(
            ge=0,
            description="jumps from below this noise level learn the teacher's denoiser; with trajectory_steps, "
            "trajectories alone",
        ),
    ] = 0.0
    trajectory_steps: TrajectorySteps = 0
    trajectory_stride: TrajectoryStride = 1
    trajectory_weight: TrajectoryWeight = 0.5
    warmup_images: WarmupImages = 0
    auxiliary_turns: AuxiliaryTurns = 1
    force: Annotated[bool, Meta(description="allow coef below .5")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order == "s":
            refuse_idle(self, ("anchor_sigma",), 'order = "s"', 'set order = "t"')
        else:
            refuse_idle(self, ("R", "r_s_max"), 'order = "t"', 'set order = "s"')
        if self.gradient == "fisher":
            refuse_idle(self, ("fisher_sigma", "s_power"), 'gradient = "fisher"', 'set gradient = "kl"')
        elif not self.fisher_sigma:
            refuse_idle(self, ("alpha", "weight"), 'gradient = "kl"', 'set gradient = "fisher" or fisher_sigma above 0')
        if not self.trajectory_steps:
            names = "trajectory_stride", "trajectory_weight", "warmup_images"
            refuse_idle(self, names, "trajectory_steps = 0", "set trajectory_steps above 0")
        elif self.trajectory_stride > self.trajectory_steps:
            raise ValueError(
                "a jump has to start within a trajectory: set trajectory_steps to trajectory_stride at least"
            )
        if self.coef >= 0.5:
            refuse_idle(self, ("force",), f"coef = {self.coef:g}", "set coef below .5")
        elif not self.force:
            raise ValueError(
                f"coef {self.coef} is below .5: the auxiliary score would overshoot its data; force = true allows it"
            )

    @property
    def beta(self) -> float:
        """Returns the share of the generator's score in the auxiliary score's target.  Source: eq. 16."""
        return 1 / (2 * self.coef)

    def notes(self) -> tuple[str, ...]:
        """Returns eq. 38: at psi's optimum the generator's loss is (2 coef - alpha) / (4 coef^2) Fisher divergence."""
        if self.gradient == "kl" and not self.fisher_sigma:
            return ()
        alpha, coef = self.alpha, self.coef
        factor = (2 * coef - alpha) / (4 * coef**2)
        derived = f"beta {self.beta:.3g}, lambda {coef / alpha - 1:.3g} (eq. 15) or {2 * coef - 1:.3g} (eq. 12)"
        note = f"alpha {alpha:g} and coef {coef:g} give {derived}; eq. 38's factor is {factor:.3g}"
        return (note,) if factor > 0 else (note, "a factor of 0 or less can diverge: raise coef above alpha / 2")
