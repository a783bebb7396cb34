"""Likelihoods of digits by our row-wise RK45; the time of scipy's solve_ivp over ours, by image and as one state."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from timing import Row, interleaved

from edmdistill.checkpoints.load import load_denoiser
from edmdistill.data.datasets import open_dataset
from edmdistill.evaluation.likelihood import log_likelihood, predict_noise
from edmdistill.sampling.seeds import SeededNoise

IMAGES, TOLERANCE, RHO = 4, 1e-3, 7.0


@torch.no_grad()
def measure(options: argparse.Namespace) -> Iterator[Row]:
    flow = load_denoiser("digits").eval().flow
    data = open_dataset("digits", split="test")
    data.use_classes(flow.label_dim)
    rows = list(range(IMAGES))
    pixels, labels = data.images(rows), data.tensors(rows)[1]
    rng = SeededNoise(rows)
    x, probe = (pixels + rng.uniform(pixels.shape[1:]) - 0.5) / 127.5 - 1, rng.signs(pixels.shape[1:]).double()
    noise = predict_noise(flow, labels)
    ends = tuple(sigma ** (1 / RHO) for sigma in (flow.sigma_min, flow.sigma_max))

    def by_scipy(indices: torch.Tensor) -> None:
        def field(r: float, y: NDArray) -> NDArray:
            state, times = torch.from_numpy(y).reshape(len(indices), -1), torch.full((len(indices),), r).double()
            n, c = noise(state[:, :-1].reshape(-1, *x.shape[1:]), times**RHO, probe[indices], indices)
            divergence = (probe[indices] * c).flatten(1).sum(1, keepdim=True)
            return (RHO * r ** (RHO - 1) * torch.cat([n.flatten(1), divergence], 1)).flatten().numpy()

        start = torch.cat([x[indices].double().flatten(1), torch.zeros(len(indices), 1).double()], 1).flatten().numpy()
        solve_ivp(field, ends, start, rtol=TOLERANCE, atol=TOLERANCE)

    limits = {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
    ways = {
        "ours": lambda: log_likelihood(noise, x, probe.float(), **limits, tolerance=TOLERANCE),
        "by image": lambda: [by_scipy(torch.tensor([row])) for row in rows],
        "as one state": lambda: by_scipy(torch.tensor(rows)),
    }
    times = interleaved(ways, 1)
    yield {"images": IMAGES, **{way: times.ratio(way, "ours") for way in ("by image", "as one state")}}
