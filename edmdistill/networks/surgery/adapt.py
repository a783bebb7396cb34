"""Prepares pretrained networks for continuous-time consistency models; this changes the function.

With c_noise = ln(sigma)/4, dF/dt is unbounded at the ends of the circle, and wide Fourier features make it large
everywhere. Here the features of c_noise become slow sines and cosines of t, fitted to the old features, and the
modulations keep their size over time. Training recovers what the fit loses.

Source: Lu & Song 2025 (sCM), section 4.1.  Differs: the paper trains its teachers with all this from the start.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edmdistill.errors import CheckpointError
from edmdistill.networks.base import Conditioning, ResidualBlock
from edmdistill.networks.embeddings import TimeEmbedding
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.rebuild import rebuild
from edmdistill.trigflow import sigma_to_time

P_MEAN, P_STD = -1.0, 1.6
"""Mean and standard deviation of ln(sigma), where the fit must be good.  Source: sCM, appendix G.2, ImageNet-64."""
RIDGE = 1e-4
"""Penalty on the weights of the fit, for features of unit mean square. A lower one fits better, but by weights of
hundreds, and so with steep slopes at the ends of the circle."""


def training_sigmas(flow: FlowNetwork, n: int) -> Tensor:
    """Returns noise levels at the quantiles of training's distribution, ln(sigma) ~ N(P_MEAN, P_STD^2).  [n] float64"""
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ln: Tensor = P_MEAN + P_STD * torch.special.ndtri(quantiles)
    return ln.exp().clamp(flow.sigma_min, flow.sigma_max)


def fit(features: Tensor, target: Tensor, ridge: float = RIDGE) -> Tensor:
    """Returns W that minimizes mean |W f - y|^2 + ridge |W|^2, in float64.  features [N,K], target [N,M] -> [M,K]"""
    f, y = features.double(), target.double()
    penalty = ridge * torch.eye(f.shape[1], dtype=torch.float64, device=f.device)
    W: Tensor = torch.linalg.solve(f.T @ f / len(f) + penalty, f.T @ y / len(f)).T
    return W


@torch.no_grad()
def with_positional_time(flow: FlowNetwork) -> FlowNetwork:
    """Returns a copy that reads t by a TimeEmbedding, fitted to its features of c_noise.

    The layers up to the first nonlinearity are linear in the features, so its input is fitted too.
    Raises: CheckpointError: the preconditioning is not EDM's, or the network reads t already, or two times.
    """
    network, edm = flow.network, flow.preconditioning
    if not isinstance(edm, EDM):
        raise CheckpointError(
            f"a positional time embedding needs EDM's preconditioning, but this teacher has {type(edm).__name__}'s, "
            "whose F is unbounded at the ends of the circle: use an EDM or EDM2 teacher"
        )
    if edm.reads_time:
        raise CheckpointError("this teacher already reads t: train it as it is, with edmdistill train diffusion")
    if flow.two_time:
        raise CheckpointError("this teacher reads two times: adapt the teacher that it was made from")
    sigma = training_sigmas(flow, 4096)
    old = copy.deepcopy(network.get_submodule(network.time_layers[0])).to("cpu", torch.float64)
    with torch.device("meta"):  # for its features alone: no random number is drawn
        embedding = TimeEmbedding(1)
    W = fit(embedding.features(sigma_to_time(sigma, flow.sigma_data)), old(edm.c_noise(sigma)))
    new = {f"{network.time_layers[0]}.mix.weight": W}
    return rebuild(flow, new, replace(edm, c_noise_kind="time"), positional_time=True)


def can_double_norm(arguments: Mapping[str, Any]) -> bool:
    """Returns whether a network of these arguments has modulations, which can be normalized."""
    return "double_norm" in arguments and bool(arguments.get("adaptive_scale", True))


@torch.no_grad()
def with_double_norm(flow: FlowNetwork) -> FlowNetwork:
    """Returns a copy whose blocks normalize their modulations to their average rms in training.

    Raises: CheckpointError: the blocks have no modulations (DDPM++ and NCSN++ add the embedding before the norm), or
        normalize them already.
    """
    network = flow.network
    if not can_double_norm(network.arguments):
        raise CheckpointError(
            f"this {type(network).__name__} has no adaptive normalization to double: leave out --double-norm"
        )
    if network.arguments["double_norm"]:
        raise CheckpointError("this teacher already has adaptive double normalization: leave out --double-norm")
    sigma = training_sigmas(flow, 1024)
    rows = torch.arange(len(sigma)) % (flow.label_dim + 1)  # every class in turn, and none
    labels = torch.eye(flow.label_dim + 1)[rows, :-1] if flow.label_dim else None
    like = next(network.parameters())
    c_noise = flow.preconditioning.c_noise(sigma).to(like)
    emb = network.embed(Conditioning(c_noise, None if labels is None else labels.to(like)))
    new = {
        f"{name}.mod_gain": torch.stack([x.square().mean(1).sqrt().mean() for x in block.modulations(emb)])
        for name, block in network.named_modules()
        if isinstance(block, ResidualBlock)
    }
    return rebuild(flow, new, double_norm=True)
