"""The same distances by torchmetrics, which takes any network for Inception."""

import warnings
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from edmdistill.evaluation.frechet import frechet_distance, statistics
from edmdistill.evaluation.inception_score import inception_score
from edmdistill.evaluation.kernel_distance import kernel_distance

pytestmark = pytest.mark.slow  # torchmetrics takes seconds to import


MODULES = {"FrechetInceptionDistance": "fid", "KernelInceptionDistance": "kid", "InceptionScore": "inception"}


class Part(nn.Module):
    """Some of the pixels, as features."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :: 48 // self.num_features].float() / 50


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Two sets of images, of other contrast.  uint8 [200,3,4,4]"""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, high, (200, 3, 4, 4), generator=generator, dtype=torch.uint8) for high in (256, 160)]


def measure(name: str, images: list[Tensor], **options: object) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = import_module(
            f"torchmetrics.image.{MODULES[name]}"
        )  # the package lists them beside torch-fidelity only
        metric = getattr(module, name)(feature=Part(), **options)
        if name == "InceptionScore":
            metric.update(images[0])
        else:
            for real, some in zip((True, False), images, strict=True):
                metric.update(some, real=real)
        result = metric.compute()
    return float(result[0] if isinstance(result, tuple) else result)


def test_frechet_distance(images: list[Tensor]) -> None:
    real, generated = (statistics(Part()(some)) for some in images)
    expected = measure("FrechetInceptionDistance", images, input_img_size=(3, 4, 4))
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-4)  # torchmetrics returns float32


def test_kernel_distance(images: list[Tensor]) -> None:
    real, generated = (Part()(some) for some in images)
    expected = measure("KernelInceptionDistance", images, subsets=2, subset_size=200)
    assert kernel_distance(real, generated) == pytest.approx(expected, rel=1e-4)


def test_inception_score(images: list[Tensor]) -> None:
    expected = measure("InceptionScore", images, splits=1)
    assert inception_score(Part()(images[0])) == pytest.approx(expected, rel=1e-5)
