"""A guided denoiser: its formula, what each network is asked, and the pairs that are refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.sampling.guidance import GuidedDenoiser

X, SIGMA = torch.linspace(-1, 1, 8).reshape(2, 1, 2, 2), torch.tensor(3.0)
LABELS = torch.eye(3)[:2]


class Scaling:
    """A denoiser that multiplies images by a number, less by .1 without classes; it notes the labels that it got."""

    def __init__(self, factor: float, dtype: torch.dtype = torch.float32, device: str = "cpu", **facts: Any) -> None:
        self.factor = factor
        self.img_channels, self.img_resolution, self.label_dim, self.label_dropout = 1, 2, 3, 0.1
        self.sigma_min, self.sigma_max = factor, 100 * factor
        self.flow = SimpleNamespace(dtype=dtype, parameters=lambda: iter([torch.empty(1, device=device)]))
        self.asked: list[Tensor | None] = []
        self.__dict__ |= facts

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.factor * sigma

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        assert sigma is SIGMA
        self.asked.append(labels)
        return (self.factor - 0.1 * (labels is None)) * x


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_it_extrapolates_away_from_the_guide(weight: float) -> None:
    """From the network without classes, a weaker one with them, or one that knows none."""
    for guide, factor, labels in (
        (None, 0.6, None),
        (Scaling(0.4), 0.4, LABELS),
        (Scaling(0.4, label_dim=0), 0.3, None),
    ):
        main = Scaling(0.7)
        found = GuidedDenoiser(main, weight, guide)(X, SIGMA, LABELS)
        torch.testing.assert_close(found, (factor + weight * (0.7 - factor)) * X)
        assert main.asked == ([LABELS] if guide else [None, LABELS])
        assert guide is None or guide.asked == [labels]


def test_its_noise_levels_are_the_main_network_s() -> None:
    guided = GuidedDenoiser(Scaling(0.7), 2.0, Scaling(0.4))
    assert (guided.sigma_min, guided.sigma_max, float(guided.round_sigma(SIGMA))) == pytest.approx((0.7, 70, 2.1))


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"img_channels": 3}, "the guide's img_channels is 3, but the main network's is 1: choose a guide"),
        ({"img_resolution": 4}, "the guide's img_resolution is 4, but the main network's is 2"),
        ({"label_dim": 5}, "the guide's label_dim is 5, but the main network's is 3"),
        ({"dtype": torch.float16}, "the guide computes in torch.float16 on cpu, but the main network in torch.float32"),
        ({"device": "meta"}, "the guide computes in torch.float32 on meta, but the main network in torch.float32 on c"),
    ],
    ids=str,
)
def test_guides_that_do_not_fit_are_refused(facts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EdmDistillError, match=sentence):
        GuidedDenoiser(Scaling(0.7), 2.0, Scaling(0.4, **facts))


def test_a_network_that_never_lacked_its_classes_guides_itself_by_force_alone() -> None:
    careless = Scaling(0.7, label_dropout=0.0)
    with pytest.raises(EdmDistillError, match=r"never trained without them: .* or say --force-guidance"):
        GuidedDenoiser(careless, 2.0)
    GuidedDenoiser(careless, 2.0, force=True)
    GuidedDenoiser(careless, 2.0, Scaling(0.4))
    for force in (False, True):
        with pytest.raises(EdmDistillError, match=r"has none: name a guide, .*, or leave guidance at 1$"):
            GuidedDenoiser(Scaling(0.7, label_dim=0), 2.0, force=force)
