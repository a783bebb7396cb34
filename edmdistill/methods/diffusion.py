"""Diffusion training in TrigFlow: how a teacher is trained.

Karras et al. 2022 (EDM), with Lu & Song 2025 (sCM), eq. 4: sigma_d F predicts the velocity. In this form EDM's loss
weight is 1. Given a teacher, training continues from it, for instance to fine-tune a network that was converted with
`convert --time-embedding positional`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta

from edmdistill.draws import Draws
from edmdistill.methods.augment_pipe import AugmentConfig, augment_role, augmented
from edmdistill.methods.base import Batch, FlowFunction, Loss, Method, NoiseRange, Role, Turn
from edmdistill.methods.noising import noised
from edmdistill.methods.weighting import adaptive
from edmdistill.schedules import lognormal_times


class DiffusionConfig(AugmentConfig, frozen=True, forbid_unknown_fields=True):
    P_mean: Annotated[float, Meta(ge=-20, le=20, description="mean of ln(sigma)")] = -1.2
    P_std: Annotated[float, Meta(gt=0, le=20, description="standard deviation of ln(sigma)")] = 1.2
    weighting: Annotated[
        Literal["none", "adaptive"], Meta(description="adaptive: a learned weight that balances the noise levels")
    ] = "none"


class Diffusion(Method[DiffusionConfig]):
    Config = DiffusionConfig
    roles = {"teacher": Role(trained=True, logvars=1)}
    product = "teacher"

    def __init__(self, config: DiffusionConfig, networks: Mapping[str, FlowFunction], noise: NoiseRange) -> None:
        super().__init__(config, networks, noise)
        self.teacher = networks["teacher"]

    @classmethod
    def roles_for(cls, config: DiffusionConfig) -> dict[str, Role]:
        return {"teacher": augment_role(cls.roles["teacher"], config)}

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("teacher", self.velocity_loss),)

    def velocity_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns L = || F(x_t, t) - v / sigma_d ||^2, ln sigma ~ N(P_mean, P_std^2);  adaptive: e^-u(t) L / D + u(t).

        Source: EDM, eq. 2 and 8; sCM, eq. 4 and 25, appendix D with w = -u.
        """
        batch, sigma_data = augmented(batch, draws, self.config), self.noise.sigma_data
        teacher = batch.conditioned(self.teacher)
        t = lognormal_times(draws, sigma_data, P_mean=self.config.P_mean, P_std=self.config.P_std)
        x_t, v = noised(batch.x0, t, draws, sigma_data)
        target = v / sigma_data
        if self.config.weighting == "none":
            F = teacher(x_t, t, batch.labels)
            return Loss((F - target).square().flatten(1).sum(1), t)
        F, u = teacher(x_t, t, batch.labels, u_at=(t,))
        error = F - target
        return Loss(adaptive(error, u), t, {"velocity_error": error.detach().square().mean()})
