"""Pretrained networks made ready for continuous-time consistency models: none of this keeps the function.

Where c_noise = ln(sigma)/4, dF/dt has no bound at the ends of the circle, and wide Fourier features make it large
everywhere. Here the features of c_noise become slow sines and cosines of t, fitted to what they replace, and the
modulations keep their size over time. What is lost, training gives back.

Source: Lu & Song 2025 (sCM), section 4.1.  Differs: the paper trains its teachers with all this from the start.
"""

from __future__ import annotations

import copy
from dataclasses import replace

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
"""Of ln(sigma), where an imitation is to be good: where sCM trains.  Source: sCM, appendix G.2, ImageNet-64."""
RIDGE = 1e-4
"""Penalty on the weights of the fit, for unit mean squares of features. Less brings nearer to the old features, but by
weights of hundreds, and with them slopes, at the ends of the circle."""


def training_sigmas(flow: FlowNetwork, n: int) -> Tensor:
    """Noise levels that stand for training's, equally likely: quantiles of N(P_MEAN, P_STD^2).  [n] float64, rising"""
    quantiles = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ln: Tensor = P_MEAN + P_STD * torch.special.ndtri(quantiles)
    return ln.exp().clamp(flow.sigma_min, flow.sigma_max)


def fit(features: Tensor, target: Tensor, ridge: float = RIDGE) -> Tensor:
    """W of the least mean |W f - y|^2 + ridge |W|^2, in float64.  features [N,K], target [N,M] -> [M,K]"""
    f, y = features.double(), target.double()
    penalty = ridge * torch.eye(f.shape[1], dtype=torch.float64, device=f.device)
    W: Tensor = torch.linalg.solve(f.T @ f / len(f) + penalty, f.T @ y / len(f)).T
    return W


@torch.no_grad()
def with_positional_time(flow: FlowNetwork) -> FlowNetwork:
    """A copy that reads t by a TimeEmbedding, fitted to the features that it had of its noise condition.

    What follows the features is linear in them, so what enters the first nonlinearity is fitted too.
    Raises: CheckpointError: another preconditioning than EDM's, a network that reads t already, or one of two times.
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
    W = fit(TimeEmbedding(1).features(sigma_to_time(sigma, flow.sigma_data)), old(edm.c_noise(sigma)))
    new = {f"{network.time_layers[0]}.mix.weight": W}
    return rebuild(flow, new, replace(edm, c_noise_kind="time"), positional_time=True)


@torch.no_grad()
def with_double_norm(flow: FlowNetwork) -> FlowNetwork:
    """A copy whose blocks normalise their modulations, to the rms that these have on the average over training.

    Raises: CheckpointError: its blocks have none (DDPM++ and NCSN++ add the embedding before the norm), or do already.
    """
    network = flow.network
    if "double_norm" not in network.arguments:
        raise CheckpointError(
            f"{type(network).__name__} has no adaptive normalization to double: leave out --double-norm"
        )
    if network.arguments["double_norm"]:
        raise CheckpointError("this teacher already has adaptive double normalization: leave out --double-norm")
    was_training = network.training
    network.eval()
    sigma = training_sigmas(flow, 1024)
    rows = torch.arange(len(sigma)) % (flow.label_dim + 1)  # every class in its turn, and none
    labels = torch.eye(flow.label_dim + 1)[rows, :-1] if flow.label_dim else None
    like = next(network.parameters())
    c_noise = flow.preconditioning.c_noise(sigma).to(like)
    emb = network.embed(Conditioning(c_noise, None if labels is None else labels.to(like)))
    new = {
        f"{name}.mod_gain": torch.stack([part.square().mean(1).sqrt().mean() for part in block.modulations(emb)])
        for name, block in network.named_modules()
        if isinstance(block, ResidualBlock)
    }
    network.train(was_training)
    return rebuild(flow, new, double_norm=True)
