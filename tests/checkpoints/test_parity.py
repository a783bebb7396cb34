"""What a conversion is compared on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edmdistill.checkpoints import parity
from edmdistill.checkpoints.convert import convert
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.parity import Parity
from edmdistill.networks.flow import FlowNetwork


@pytest.mark.parametrize(("parity", "sizes"), [("full", {8}), ("quick", {2}), ("none", set())])
def test_the_comparison_is_as_asked(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parity: Parity, sizes: set[int]
) -> None:
    seen, real = set(), FlowNetwork.raw

    def raw(flow: FlowNetwork, x: Tensor, *more: object) -> tuple[Tensor, ...]:
        seen.add(x.shape[-1])
        return real(flow, x, *more)

    monkeypatch.setattr("edmdistill.checkpoints.convert.noise_dependence", lambda flow: 0.1)
    monkeypatch.setattr(FlowNetwork, "raw", raw)
    done = convert(golden / "edm-tiny-cond.pkl", tmp_path / "out", parity=parity)
    assert seen == sizes
    assert len(done.parity) == (8 if sizes else 0)
    assert ("relative difference" in done.describe("it")) == bool(sizes)
    assert "is written" in done.describe("it")


@pytest.mark.parametrize("name", ["edm-tiny-cond.pkl", "edm2-rgb-cond.pkl"])
def test_a_large_network_is_compared_in_float32_alone(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("edmdistill.checkpoints.parity.SMALL", 0)
    done = convert(golden / name, tmp_path / "out")
    assert {row.float64 for row in done.parity} == {None}
    sigmas = [row.sigma for row in done.parity]
    assert sigmas == pytest.approx([80, 2.515], rel=1e-3)
    assert max(row.float32 for row in done.parity) < 2e-5
    assert "float64" not in done.describe("it")


@pytest.mark.parametrize("name", ["edm-tiny-cond.pkl", "iddpm-adm-uncond.pkl.gz"])
def test_what_is_compared_is_noisy_data_with_and_without_classes(
    golden: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    flow, _ = load_flow(golden / name)
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def denoiser(flow: FlowNetwork) -> Callable[..., Tensor]:
        return lambda x, sigma, classes: seen.append((x, sigma, classes)) or x

    monkeypatch.setattr(parity, "Denoiser", denoiser)
    comparison = parity.plan_comparison(flow, "quick")._replace(size=64)
    images = parity.denoised_images(flow, torch.float64, comparison, lambda stage: None)
    ((x, sigma, classes),) = seen
    assert torch.equal(images, x)
    torch.testing.assert_close(x.std((1, 2, 3)), (sigma**2 + flow.sigma_data**2).sqrt(), rtol=0.05, atol=0)
    if not flow.label_dim:
        assert classes is None
        return
    assert classes is not None
    assert classes.sum(1).tolist() == [1, 0] * 4
    assert len(set(classes[::2].argmax(1).tolist())) == min(4, flow.label_dim)


def test_an_images_difference_is_its_largest_relative_to_its_largest_pixel() -> None:
    expected = torch.tensor([[1.0, -4.0], [0.1, 0.2]]).reshape(2, 1, 1, 2)
    found = expected + torch.tensor([[0.0, -1.0], [-0.1, 0.0]]).reshape(2, 1, 1, 2)
    assert parity._relative(found, expected) == pytest.approx([0.25, 0.5])
