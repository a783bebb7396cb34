"""IMM: inductive moment matching, jumps from t and from r to s whose ends have one distribution; from data alone.

Zhou, Ermon & Song 2025 (ICML), algorithm 3. Groups of M images, the particles, share t, r and s. Each has its own
class, so that what is matched is the mixture of a group's classes.

    tau_t ~ U(eps, T),   tau_s ~ U(eps, tau_t),   eta_r = max(eta_s, eta_t - (eta_max - eta_min) / 2^k)
    x_t = cos(t) x0 + sin(t) z,   x_r = cos(r) x0 + sin(r) z                 one noise for both
    y_t = f(x_t, t, s),   y_r = f^-(x_r, r, s),   f(x, t, s) = cos(t-s) x - sin(t-s) sigma_d F(x, t; s)
    k(y, y') = exp(-max(|y - y'|, 1e-8) / (D sigma_d sin(t-s)))              D numbers in an image
    L = w(t) / M^2 sum_ij [k(y_t^i, y_t^j) + k(y_r^i, y_r^j) - 2 k(y_t^i, y_r^j)]
    w(t) = 1/2 sigmoid(b - lambda) (-dlambda/dtau) alpha^a / (alpha^2 + sigma^2),   lambda = -2 ln(eta)

tau is the time of a path from data to noise, OT-FM's or the cosine's; on both, eta = sigma / alpha = tan(t). With the
paper's parameterization Simple-EDM, which is TrigFlow's F, points of the two paths differ in scale alone, which k
cancels. So x, f and k are the same here, and the path decides only how t and s are drawn and how t is weighted.

Differs: eps and T are at the teacher's sigma_min and sigma_max: on OT-FM .004 and .9938, in the paper .006 and .994.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.augment_pipe import AugmentConfig, augment_role, augmented
from edmdistill.methods.base import Batch, Loss, Method, Role, Sampling, SecondGain, Turn
from edmdistill.methods.moment_matching import PATHS, elbo_weight, squared_mmd
from edmdistill.trigflow import ddim_step, denoised, diffuse


class IMMConfig(AugmentConfig, frozen=True, forbid_unknown_fields=True):
    particles: Annotated[int, Meta(ge=1, le=1024, description="M, images that share t, r and s; divides the batch")] = 4
    path: Annotated[Literal["ot-fm", "cosine"], Meta(description="path on whose time t and s are uniform")] = "ot-fm"
    k: Annotated[float, Meta(ge=0, le=40, description="r is 2^-k of the range of sigma / alpha below t")] = 12.0
    min_gap: Annotated[float, Meta(ge=0, lt=1, description="smallest distance of r from t, in the path's time")] = 0.0
    a: Annotated[float, Meta(ge=0, le=10, description="power of alpha in the weight; 2 is for many steps")] = 1.0
    b: Annotated[float, Meta(ge=-100, le=100, description="shift of the weight's sigmoid")] = 5.0
    s_gain: SecondGain = 0.0


class IMM(Method[IMMConfig]):
    Config = IMMConfig
    roles = {"generator": Role(trained=True, two_time=True)}

    @classmethod
    def roles_for(cls, config: IMMConfig) -> dict[str, Role]:
        return {"generator": augment_role(cls.roles["generator"], config)._replace(second_gain=config.s_gain)}

    @classmethod
    def group_size(cls, config: IMMConfig) -> int:
        return config.particles

    @classmethod
    def sampling(cls, config: IMMConfig) -> Sampling:
        return Sampling(gamma=0.0)

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("generator", self.moment_matching_loss),)

    def moment_matching_loss(self, batch: Batch, draws: Draws) -> Loss:
        """Returns each particle's part of L, whose mean is L."""
        config, sigma_data = self.config, self.noise.sigma_data
        batch = augmented(batch, draws, config)
        generator = batch.conditioned(self.networks["generator"])
        t, s, r = (time.repeat_interleave(config.particles) for time in self.draw_times(draws))
        z = draws.normal_like(batch.x0, sigma_data)
        with torch.no_grad():  # so that both share the dropout of the next pass
            x_r = diffuse(batch.x0, z, r)
            y_r = ddim_step(x_r, generator(x_r, r, batch.labels, s), r, s, sigma_data)
        x_t = diffuse(batch.x0, z, t)
        F = generator(x_t, t, batch.labels, s)
        y_t = ddim_step(x_t, F, t, s, sigma_data)
        mmd = squared_mmd(y_t, y_r, sigma_data * (t - s).sin(), config.particles)
        weight = elbo_weight(t.tan(), PATHS[config.path], config.a, config.b)
        x0 = denoised(x_t, F, t, sigma_data).detach()
        return Loss(weight.to(mmd) * mmd, t, {"squared_mmd": mmd.detach().mean()}, x0)

    def draw_times(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Draws t, s and r of each group, s <= r <= t.  [B/M] each  Source: section 4.2, appendices C.6, C.7 and I."""
        config, path, (sigma_data, *ends) = self.config, PATHS[self.config.path], self.noise
        low, high = torch.tensor(ends, dtype=torch.float64) / sigma_data
        first, last = float(path.tau(low)), float(path.tau(high))
        u_t, u_s = draws.uniform(2)[:: config.particles].unbind(1)
        tau_t = first + (last - first) * u_t
        tau_s = first + (tau_t - first) * u_s
        eta_t, eta_s = path.eta(tau_t), path.eta(tau_s)
        eta_r = eta_t - float(high - low) / 2**config.k
        if config.min_gap:
            eta_r = torch.minimum(eta_r, path.eta((tau_t - config.min_gap).clamp(min=0)))
        return eta_t.atan(), eta_s.atan(), torch.maximum(eta_r, eta_s).atan()
