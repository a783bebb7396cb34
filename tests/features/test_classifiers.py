"""Classifiers: ln p whichever way they are named, and a sentence where they know other classes."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from edmdistill.checkpoints.store import load_tensors, save_tensors
from edmdistill.data.datasets import open_dataset
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import CheckpointError, EdmDistillError
from edmdistill.features.classifiers import load_classifier
from edmdistill.features.spaces import load_features


class Corners(nn.Module):
    """Logits that are the first pixels of an image, as a classifier sees them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("classifiers") / "corners.pt"
    torch.jit.save(torch.jit.script(Corners()), file)
    return str(file)


def test_a_script_sees_minus_one_to_one(script: str):
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    images[1, 0, 0] = torch.tensor([255, 51])
    expected = torch.tensor([[-1, -1, -1], [1, -0.6, -1]], dtype=torch.float64)
    found = load_classifier(script, 3)(images)
    torch.testing.assert_close(found, expected - expected.logsumexp(1, keepdim=True))


def test_the_digits_judge_by_name_and_by_file(tmp_path: Path):
    data = open_dataset("digits")
    images, labels = data.images(range(50)), data.labels(range(50))
    found = load_classifier("digits", 10)(images)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(found.exp(), load_features("digits").logits(images).softmax(1))
    assert (found.argmax(1) == labels).double().mean() > 0.9
    own = shutil.copy(EMBEDDED["digits"].features, tmp_path / "own.safetensors")
    assert torch.equal(load_classifier(str(own), 10)(images), found)


def test_each_embedded_set_has_a_classifier_of_its_own(tmp_path: Path):
    """By name and by the shapes in a file, whose weights count."""
    images = open_dataset("tiles").images(range(9))
    found = load_classifier("tiles", len(EMBEDDED["tiles"].label_names))(images)
    torch.testing.assert_close(found.exp(), load_features("tiles").logits(images).softmax(1))
    weights = load_tensors(EMBEDDED["tiles"].features)[0]
    for name in weights.keys() & {"head.weight", "head.bias"}:
        weights[name] = torch.zeros_like(weights[name])
    save_tensors(tmp_path / "even.safetensors", weights)
    even = load_classifier(str(tmp_path / "even.safetensors"), found.shape[1])(images)
    torch.testing.assert_close(even.exp(), torch.full_like(found, 1 / found.shape[1]))


class Sure(nn.Module):
    """One class, sure enough that float32 would round ln p to 0; of black images, no tensor."""

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        logits = torch.tensor([[0.0, 20.0]]).expand(len(images), 2)
        if bool(images.max() < 0):
            return logits, logits
        return logits


def test_logits_are_normalized_in_double_precision(tmp_path: Path):
    file = tmp_path / "sure.pt"
    torch.jit.save(torch.jit.script(Sure()), file)
    classify = load_classifier(str(file), 2)
    found = classify(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8))
    assert float(found[0, 1]) == pytest.approx(-math.exp(-20), rel=1e-6)
    with pytest.raises(EdmDistillError, match=r"sure\.pt must return a tensor of logits \[N,2\]: check the file"):
        classify(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))


def test_other_classes_than_the_network_s_are_refused(script: str):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(EdmDistillError, match=r"gives \[2, 3\] for 2 images of 4 classes, but \[2, 4\] was expected"):
        load_classifier(script, 4)(images)
    with pytest.raises(EdmDistillError, match="this network has none: leave it out"):
        load_classifier(script, 0)


def test_what_is_no_file_of_a_classifier_is_refused(tmp_path: Path):
    for name in ("none.pt", "none.safetensors"):
        with pytest.raises(CheckpointError):
            load_classifier(str(tmp_path / name), 3)
