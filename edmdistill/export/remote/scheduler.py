"""Gamma-sampling as a scheduler of diffusers, in EDM's scale: x = x0 + sigma n."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from edmdistill.schedules import generator_sigmas


class GammaScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Jumps below each next noise level and returns to it by fresh noise z; the last jump leads to the image.

        x = x0 + s n + gamma sigma z,    n = (x - x0) / its noise level,    s = sqrt(1 - gamma^2) sigma

    Timesteps are noise levels, and the model predicts x0; a model of two times also gets s, see `sigma_next`.

    Args:
        sigmas: noise levels by number of steps, {"2": [80.0, 2.515]}; other numbers use EDM's curve.
        sigma_min, sigma_max: the range of noise levels that the network was trained for.
        gamma: share of fresh noise, in [0, 1].

    Source: Yu et al. 2025 (CoSIM), algorithm 1; Kim et al. 2024 (CTM), algorithm 2, for gamma.
    """

    order = 1
    source = Path(__file__).read_text(encoding="utf-8")  # for GammaPipeline.save_pretrained

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sigmas: Mapping[str, Sequence[float]] = {},
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        gamma: float = 1.0,
    ) -> None:
        self.levels = self.timesteps = torch.empty(0)
        self.init_noise_sigma = sigma_max
        self.step_index = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Starts a new trajectory, with so many noise levels or the given ones, which must decrease.

        num_inference_steps: None = 2, or the fewest that the generator has levels for.

        Raises: ValueError: no levels, levels that increase, or one outside of the network's range.
        """
        low, high = self.config.sigma_min, self.config.sigma_max
        if sigmas is None:
            if num_inference_steps is None:
                stored = [int(steps) for steps in self.config.sigmas]
                num_inference_steps = 2 if 2 in stored or not stored else min(stored)
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
            tuned = self.config.sigmas.get(str(num_inference_steps))
            sigmas = tuned or generator_sigmas(num_inference_steps, low, high).tolist()
        levels = list(sigmas)
        known = all(low * (1 - 1e-6) <= sigma <= high * (1 + 1e-6) for sigma in levels)
        if not levels or not known or levels != sorted(levels, reverse=True):
            raise ValueError(f"sigmas must decrease and be between {low:g} and {high:g}, but they are {levels}")
        self.levels = torch.tensor([*levels, 0.0], dtype=torch.float32, device=device)
        self.timesteps = self.levels[:-1]
        self.init_noise_sigma = levels[0]
        self.step_index = 0

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Returns the sample as it is: the network scales its input itself."""
        return sample

    def sigma_next(self, gamma: float | None = None) -> Tensor:
        """Returns s, the noise level before this step's fresh noise; 0 in the last.  gamma: as in step.  [] float32"""
        gamma = self.config.gamma if gamma is None else gamma
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma, the share of fresh noise, must be in [0, 1], not {gamma}")
        s: Tensor = math.sqrt(1 - gamma**2) * self.levels[self.step_index + 1]
        return s

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        gamma: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Returns x at the next noise level; after the last, x0.

        Args:
            model_output: x0.  [B,C,H,W] float32
            timestep: the noise level of sample.
            sample: x.  [B,C,H,W] float32
            gamma: share of fresh noise, in [0, 1]; None = the scheduler's.
            generator: for the fresh noise, one for all images or one for each.
        """
        s = self.sigma_next(gamma)
        gamma = self.config.gamma if gamma is None else gamma
        self.step_index += 1
        if self.step_index == len(self.timesteps):
            return model_output
        fresh = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        noise = (sample - model_output) / timestep
        x: Tensor = model_output + s * noise + gamma * self.levels[self.step_index] * fresh
        return x
