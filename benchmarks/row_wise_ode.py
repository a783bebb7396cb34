"""Likelihoods by our row-wise RK45 and by scipy's solve_ivp, image by image and as one state: times as ratios to ours.

python benchmarks/row_wise_ode.py [--images 32] [--tolerance 1e-3]
"""

import argparse
import time

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from edmdistill.checkpoints.load import load_denoiser
from edmdistill.data.datasets import open_dataset
from edmdistill.evaluation.likelihood import log_likelihood, predict_noise
from edmdistill.sampling.seeds import SeededNoise

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=32)
parser.add_argument("--tolerance", type=float, default=1e-3)
options = parser.parse_args()
torch.set_num_threads(1)

flow = load_denoiser("digits").eval().flow
data = open_dataset("digits", split="test")
data.use_classes(flow.label_dim)
rows = list(range(options.images))
pixels, labels = data.images(rows), data.tensors(rows)[1]
rng = SeededNoise(rows)
x, probe = (pixels + rng.uniform(pixels.shape[1:]) - 0.5) / 127.5 - 1, rng.signs(pixels.shape[1:]).double()
noise, rho = predict_noise(flow, labels), 7.0
ends = tuple(sigma ** (1 / rho) for sigma in (flow.sigma_min, flow.sigma_max))


def by_scipy(indices: torch.Tensor) -> None:
    def field(r: float, y: NDArray[np.float64]) -> NDArray[np.float64]:
        state, times = torch.from_numpy(y).reshape(len(indices), -1), torch.full((len(indices),), r).double()
        n, c = noise(state[:, :-1].reshape(-1, *x.shape[1:]), times**rho, probe[indices], indices)
        divergence = (probe[indices] * c).flatten(1).sum(1, keepdim=True)
        return (rho * r ** (rho - 1) * torch.cat([n.flatten(1), divergence], 1)).flatten().numpy()

    start = torch.cat([x[indices].double().flatten(1), torch.zeros(len(indices), 1).double()], 1).flatten().numpy()
    solve_ivp(field, ends, start, rtol=options.tolerance, atol=options.tolerance)


@torch.no_grad()
def main() -> None:
    seconds, limits = [], {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
    for work in (
        lambda: log_likelihood(noise, x, probe.float(), **limits, tolerance=options.tolerance),
        lambda: [by_scipy(torch.tensor([row])) for row in rows],
        lambda: by_scipy(torch.tensor(rows)),
    ):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    ours, single, whole = seconds
    print(f"solve_ivp, image by image: {single / ours:.2f} times ours; all as one state: {whole / ours:.2f} times ours")


main()
