"""Every golden network against the official code's outputs."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from golden_set import NETWORKS
from safetensors.torch import load_file
from torch import Tensor

from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.kernels import linear
from edmdistill.networks.base import Conditioning
from edmdistill.networks.flow import Denoiser, FlowNetwork

TOLERANCE = 2e-5
"""Relative to the largest value; the official code agrees with itself on other machines to some 2e-6."""


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@cache
def build(path: Path, upcast: bool = False) -> FlowNetwork:
    return build_official(read_official(path), upcast=upcast)[0].eval()


class Golden:
    """A golden network and its calls: name -> tensor, inputs and outputs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.flow = build(path)
        self.denoiser = Denoiser(self.flow)
        self.cases: list[dict[str, Tensor]] = [{}, {}, {}]
        for name, value in load_file(path.parent / (path.name.split(".pkl")[0] + ".safetensors")).items():
            if name.startswith("case"):
                self.cases[int(name[4])][name[6:]] = value


@pytest.fixture(params=NETWORKS)
def network(golden: Path, request: pytest.FixtureRequest) -> Golden:
    return Golden(golden / request.param)


@torch.no_grad()
def test_denoiser(network: Golden) -> None:
    for case in network.cases:
        x, sigma = case["x"], case["sigma"]
        for output, labels in (("D_x", "labels"), ("D_x_nolabels", "none"), ("D_x_softlabels", "labels_soft")):
            if output in case:
                assert error(network.denoiser(x, sigma, case.get(labels)), case[output]) <= TOLERANCE


@torch.no_grad()
def test_winograd(network: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen networks, all of whose convolutions that can be so are Winograd's, as in large networks."""
    count = 0

    def can(x: Tensor, weight: Tensor) -> bool:
        nonlocal count
        count += (possible := x.shape[2] % 4 == x.shape[3] % 4 == 0 and x.dtype == torch.float32)
        return possible

    monkeypatch.setattr(linear, "pays", can)
    frozen = copy.deepcopy(network.flow).requires_grad_(False)
    frozen.network.fold()
    for case in network.cases:
        if "D_x" in case:
            found = Denoiser(frozen)(case["x"], case["sigma"], case.get("labels"))
            assert error(found, case["D_x"]) <= 1e-5
    assert count >= 20


@torch.no_grad()
def test_raw_network(network: Golden) -> None:
    for case in network.cases:
        x, condition = case["x_in"], Conditioning(case["c_noise"], case.get("labels"))
        assert error(network.flow.network(x, condition), case["F_x"]) <= TOLERANCE
        if "F_x_half" in case:
            found = network.flow.network(x.half(), condition)
            assert found.dtype == torch.float16
            assert error(found, case["F_x_half"]) <= 1e-2


@torch.no_grad()
def test_augment_labels(network: Golden) -> None:
    for case in (case for case in network.cases if "augment_labels" in case):
        sigma = case["sigma"].float().reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = network.flow.preconditioning.coefficients(sigma)
        x, augment = case["x"].float(), case["augment_labels"]
        condition = Conditioning(c_noise.flatten(), case.get("labels"), augment_labels=augment)
        raw = network.flow.network(c_in * x, condition)
        assert error(c_skip * x + c_out * raw, case["D_x_aug"]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("network", [name for name in NETWORKS if name.startswith(("edm2", "phema"))], indirect=True)
def test_log_variance_and_upcast_gains(network: Golden) -> None:
    upcast = Denoiser(build(network.path, upcast=True))
    for case in network.cases:
        x, sigma, labels = case["x"], case["sigma"], case.get("labels")
        assert error(network.denoiser.logvar(sigma), case["logvar"]) <= TOLERANCE
        assert error(upcast(x, sigma, labels), case["D_x_up"]) <= TOLERANCE
