"""evaluate of images that exist already: in memory, in an .npz, a folder or a zip."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from digit_images import TEST, TRAIN, held_out, write_folder, write_npz

from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation.compare import Row, compare
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.frechet import frechet_distance, statistics
from edmdistill.evaluation.images import open_images
from edmdistill.features.spaces import load_features


def test_samples_say_how_they_were_drawn(tmp_path: Path) -> None:
    """Of decoded latents, the classes cannot be drawn again without the network; others than all of them do not say."""
    folder = write_folder(tmp_path, torch.zeros(3, 1, 8, 8, dtype=torch.uint8), [1, 0, 1])
    record = {"request": {"classes": "drawn", "vae": "ab" * 32}, "count": 3, "complete": True, "not_finite": []}
    for changes, expected in (
        ({}, ("drawn", "ab" * 32)),
        ({"count": 4}, ("given", None)),
        ({"complete": False}, ("given", None)),
        ({"not_finite": [3]}, ("given", None)),
        ({"request": {"classes": 1, "vae": 2, "sampler": 3}}, ("given", None)),
    ):
        (folder / "samples.json").write_text(json.dumps(record | changes))
        images = open_images(folder, 5)
        assert (images.label_source, images.decoder, images.sampler) == (*expected, None)


def test_images_are_the_same_images_in_any_wrapping(tmp_path: Path) -> None:
    images, classes = held_out(), TEST.labels(range(297))
    assert classes is not None
    bare = evaluate(images, protocol="digits")
    npz = evaluate(write_npz(tmp_path, images, seeds=np.arange(297), labels=classes.numpy()), protocol="digits")
    folder = evaluate(write_folder(tmp_path, images, classes.tolist()), protocol="digits")
    space = load_features("digits")
    fd = frechet_distance(statistics(space(images)), statistics(space(TRAIN.images(range(1500)))))
    for result in (bare, npz, folder):
        assert result.metrics["fd_digits@297"] == pytest.approx(fd, rel=1e-6)
        assert result.sampler is None
    assert npz.metrics == pytest.approx(folder.metrics)
    assert npz.metrics["class_accuracy@297"] >= 0.98
    compare([Row("npz", npz), Row("folder", folder)])
    assert (bare.protocol.seeds, bare.protocol.labels) == (None, "unknown")
    assert (npz.protocol.seeds, npz.protocol.labels) == ("0-296", "given")
    assert folder.provenance["source"] == str(tmp_path / "images")


def test_real_against_itself_is_nothing() -> None:
    real = TRAIN.images(range(1500))
    assert abs(evaluate(real, protocol="digits").metrics["fd_digits@1500"]) < 1e-6
    assert abs(evaluate(real, "digits", protocol="pixels").metrics["fd_pixels@1500"]) < 1e-6


def test_pixels_take_any_reference(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, held_out()[:20], None)
    result = evaluate(held_out(), folder, protocol="pixels")
    reference = result.protocol.reference
    assert reference is not None
    assert (reference.source, reference.split, reference.n) == ("images", "train", 20)
    assert result.protocol.weights == {"pixels": None}


def test_the_reference_is_known_by_its_content(tmp_path: Path) -> None:
    same, other = tmp_path / "a", tmp_path / "b"
    hashes = []
    for path, images in ((same, held_out()[:20]), (other, held_out()[1:21])):
        path.mkdir()
        result = evaluate(held_out(), write_folder(path, images, None), protocol="pixels")
        assert result.protocol.reference is not None
        hashes.append(result.protocol.reference.sha256)
    assert hashes[0] != hashes[1]
    other = evaluate(held_out(), same / "images", protocol="pixels")
    with pytest.raises(EdmDistillError, match="they differ in reference"):
        compare([Row("one", result), Row("other", other)])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"latents": np.zeros((2, 4, 8, 8), np.float32)},
            "holds latents, but images or arr_0 were expected, .*; decode latents first",
        ),
        ({"images": np.zeros((2, 1, 8, 8), np.uint8)}, r"images are uint8 \[2, 1, 8, 8\], but uint8 \[N,H,W,C\]"),
        ({"images": np.zeros((2, 8, 8, 1))}, r"images are float64"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8), "seeds": np.arange(3)}, r"seeds are int64 \[3\], but an integer"),
        ({"images": np.zeros((2, 8, 8, 1), np.uint8), "labels": np.ones(2)}, r"labels are float64 \[2\]"),
        ({"images": np.array([{}, None])}, r"images is not a readable array \(Object arrays cannot be read"),
    ],
)
def test_broken_npz(columns: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **columns)
    with pytest.raises(DatasetError, match=message):
        evaluate(tmp_path / "x.npz", protocol="digits")


def test_images_without_classes_in_an_npz(tmp_path: Path) -> None:
    path = write_npz(tmp_path, held_out()[:5], seeds=np.arange(5), labels=np.full(5, -1))
    assert set(evaluate(path, protocol="digits").metrics) == {"fd_digits@5"}


def test_jpegs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"000000\.jpg is a JPEG, .* changes every metric"):
        evaluate(write_folder(tmp_path, held_out()[:3], None, "jpg"), protocol="digits")
