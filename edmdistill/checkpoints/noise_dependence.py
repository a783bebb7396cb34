"""Tells denoisers from generators: their files look the same, and each loads as the other.

At sigma_max the data are lost in the noise: a denoiser's D(x; sigma_max) is nearly the mean of its data, whatever the
noise, and a generator's is a different image for each noise. `noise_dependence` is how much D varies with the noise
there, in units of sigma_data:

    sqrt(mean over pixels and classes of Var_n D(sigma_max n; sigma_max, class)) / sigma_data

For a denoiser of Gaussian data whose covariance has eigenvalues l_i it is sqrt(mean l_i^2 / (l_i + sigma_max^2)) /
sigma_data: 0.1 to 0.2 for natural images of 64x64 pixels and sigma_max 80, and more for larger images, because the few
largest eigenvalues, those of brightness and color, grow with them. The digits teacher, which has hardly seen sigma_max
in training, has 0.29. For a generator it is the standard deviation of a pixel among the images of a class, over
sigma_data: 0.8 for digits (0.48 after 3% of the training), and closer to 1 where classes are more diverse.
"""

from __future__ import annotations

import math

import torch

from edmdistill.errors import printable, without_secrets
from edmdistill.kernels.linear import multiplies_bfloat16
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import NoisePrediction

CLASSES, NOISES = 4, 4
LARGE = 2**12
"""Size of images, in numbers, from which one class and two noises are enough: the mean is over more pixels."""
GENERATOR_RANGE = 0.4, 2.0
"""noise_dependence of generators. A denoiser's is smaller; a larger one is neither's, as an untrained network's."""


@torch.no_grad()
def noise_dependence(flow: FlowNetwork) -> float:
    """Returns how far D at sigma_max depends on the noise, in units of sigma_data; see above.

    Large images are computed in bfloat16 where the CPU has instructions for it: the rounding changes less than 0.01;
    unless the network predicts the noise, where rounding alone would vary by 1.
    """
    training, compute_dtype, denoiser = flow.training, flow.compute_dtype, Denoiser(flow).eval()
    like = next(flow.parameters())
    size = flow.img_channels, flow.img_resolution, flow.img_resolution
    rng = torch.Generator().manual_seed(0)
    sigma = torch.tensor(flow.sigma_max, device=like.device)
    noises, different = NOISES, CLASSES
    if math.prod(size) >= LARGE:
        noises, different = 2, 1
        exact = isinstance(flow.preconditioning, NoisePrediction)
        flow.compute_dtype = compute_dtype if exact or not multiplies_bfloat16() else torch.bfloat16
    x = sigma * torch.randn(noises, *size, generator=rng).to(like, memory_format=torch.channels_last)
    classes: list[int | None] = [i * flow.label_dim // CLASSES for i in range(min(different, flow.label_dim))]
    variances = []
    for label in classes or [None]:
        labels = None if label is None else torch.tensor([label], device=like.device)
        variances.append(float(denoiser(x, sigma, labels).double().var(0).mean()))
    flow.compute_dtype = compute_dtype
    flow.train(training)
    return math.sqrt(sum(variances) / len(variances)) / flow.sigma_data


def describe_dependence(value: float) -> str:
    """Returns a sentence on a network of this noise_dependence."""
    low, high = GENERATOR_RANGE
    kind = (
        "like a denoiser's" if value < low else "like a generator's" if value < high else "unlike a trained network's"
    )
    return f"At sigma_max its images vary with the noise by {value:.3g} sigma_data, {kind}."


def generator_warning(value: float | None, source: object) -> str | None:
    """Returns the warning that a teacher looks like a generator, or None.

    Args:
        value: its noise_dependence; None: not measured.
        source: as the user named it.
    """
    if value is None or not GENERATOR_RANGE[0] <= value < GENERATOR_RANGE[1]:
        return None
    name, limit = printable(without_secrets(str(source))), GENERATOR_RANGE[0]
    return (
        f"Warning: {name} behaves like a generator, not like a teacher: at sigma_max its images vary with the noise by "
        f"{value:.2g} sigma_data, and a denoiser's by less than {limit:g}; what is distilled from it "
        "will be wrong unless it is a denoiser after all."
    )
