"""EDM's augmentation: the official code's results, exact moves, and how often each comes."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.augment_pipe import LABELS, AugmentConfig, augmented, moved, rotating
from edmdistill.methods.base import Batch

WITHOUT = ("xflip", "scale", "anisotropy", "translation")
"""MeanFlow's: neither flips in y nor rotations."""


def scripted(uniform: Iterator[Tensor], normal: Iterator[Tensor]) -> Any:
    """Draws that give these numbers, in the order of the calls."""
    return SimpleNamespace(uniform=lambda: next(uniform), normal=lambda *_: next(normal))


@pytest.mark.parametrize(("augmentations", "names"), [(tuple(LABELS), ""), (WITHOUT, "_6")])
def test_the_official_code_gives_the_same(augmentations: Any, names: str) -> None:
    golden = load_file(Path(__file__).parents[1] / "golden" / "augment-pipe.safetensors")
    asked = [
        "xflip",
        "yflip",
        "yflip?",
        "scale?",
        "rotation",
        "rotation?",
        "anisotropy?",
        "angle",
        "angle?",
        "translation?",
    ]
    asked = [name for name in asked if not names or name[:2] not in ("yf", "ro")]
    normal = [
        golden["normal.scale"],
        golden["normal.anisotropy"],
        torch.stack([golden["normal.tx"], golden["normal.ty"]], 1),
    ]
    draws = scripted(iter([golden[f"uniform.{name}"] for name in asked]), iter(normal))
    batch = augmented(Batch(golden["x"], None), draws, AugmentConfig(augment=0.5, augmentations=augmentations))
    torch.testing.assert_close(batch.augment_labels, golden[f"labels{names}"])
    torch.testing.assert_close(batch.x0, golden[f"images{names}"], rtol=0, atol=2e-5)


def images(rows: int = 2, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_quarter_turn_and_a_shift_by_pixels_are_exact() -> None:
    """Up to the filter, whose halves are not equal to the last bit of float32."""
    x, still = images(), torch.zeros(2, 2, dtype=torch.float64)
    turn = rotating(torch.full((2,), math.pi / 2, dtype=torch.float64))
    torch.testing.assert_close(moved(x, turn @ turn @ turn @ turn, still), x, rtol=0, atol=1e-6)
    x = images(2, 8, 12)
    shift = torch.tensor([[3 / 12, -2 / 8], [0.0, 0.0]], dtype=torch.float64)
    y = moved(x, torch.eye(2, dtype=torch.float64).expand(2, 2, 2), shift)
    torch.testing.assert_close(y[1], x[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(y[0, :, :-2, 3:], x[0, :, 2:, :-3], rtol=0, atol=1e-6)
    torch.testing.assert_close(y[0, :, :-2, :3], x[0, :, 2:, 1:4].flip(2), rtol=0, atol=1e-6)  # the reflection


def test_an_image_is_augmented_by_its_own_draws() -> None:
    x, config = images(200), AugmentConfig(augment=0.7)
    whole = augmented(Batch(x, None), Draws(0, 200), config)
    part = augmented(Batch(x[64:80], None), Draws(0, 200, slice(64, 80)), config)
    assert whole.augment_labels is not None
    assert part.augment_labels is not None
    torch.testing.assert_close(part.augment_labels, whole.augment_labels[64:80], rtol=0, atol=0)
    torch.testing.assert_close(part.x0, whole.x0[64:80])


def test_how_often_each_comes_and_how_far_it_goes() -> None:
    """Five standard deviations of a share of 4000 images are .04."""
    x = torch.zeros(4000, 1, 2, 2)
    labels = augmented(Batch(x, None), Draws(0, 4000), AugmentConfig(augment=0.3)).augment_labels
    assert labels is not None
    shares = dict(zip(("xflip", "yflip", "scale"), (labels[:, :3] != 0).double().mean(0).tolist(), strict=True))
    assert shares == pytest.approx({"xflip": 0.5, "yflip": 0.15, "scale": 0.3}, abs=0.04)
    rotation, anisotropy, translation = labels[:, 3:].double().reshape(-1, 3, 2).unbind(1)
    for pair in rotation, anisotropy, translation:
        assert float((pair != 0).any(1).double().mean()) == pytest.approx(0.3, abs=0.04)
    torch.testing.assert_close((rotation[:, 0] + 1) ** 2 + rotation[:, 1] ** 2, torch.ones(4000, dtype=torch.float64))
    assert float((anisotropy[:, 1] != 0).double().mean()) == pytest.approx(0.15, abs=0.04)
    for w in labels[:, 2].double(), anisotropy.norm(dim=1) * anisotropy[:, 0].sign(), *translation.unbind(1):
        assert float(w[w != 0].std()) == pytest.approx(1, abs=0.1)


def test_without_augmentation_the_batch_stays_as_it_is() -> None:
    batch = Batch(images(), None)
    assert augmented(batch, Draws(0, 2), AugmentConfig()) is batch


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"augmentations": ("scale",)}, "with augment = 0, augmentations has no effect: set augment above 0"),
        ({"augment": 0.1, "augmentations": ("scale", "xflip")}, "each once and in this order"),
        ({"augment": 0.1, "augmentations": ("scale", "scale")}, "each once and in this order"),
    ],
)
def test_what_is_refused(options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AugmentConfig(**options)
