"""What a conversion is compared on."""

from pathlib import Path

import pytest
from torch import Tensor

from edmdistill.checkpoints.convert import convert
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
