"""A data set is recognized by its name and by its number of classes."""

from dataclasses import replace
from pathlib import Path

import pytest

from edmdistill.checkpoints.class_names import (
    class_names,
    dataset_class_names,
    imagenet_synsets,
    official_class_names,
)
from edmdistill.checkpoints.nvidia import read_official


@pytest.mark.parametrize(
    ("path", "data_set"),
    [
        ("/data/cifar10/train.zip", "cifar10"),
        ("C:\\data\\CIFAR-10\\train.zip", "cifar10"),
        ("https://host/edm-cifar10-32x32-cond-vp.pkl", "cifar10"),
        ("/home/cifar10/mine/train.zip", None),  # further up, it says nothing of the file
        ("D:\\cifar10\\mine\\train.zip", None),
        ("train.zip", None),
        (None, None),
        (10, None),
    ],
)
def test_the_last_two_names_of_a_path_tell(path: object, data_set: str | None) -> None:
    expected = None if data_set is None else dataset_class_names(data_set)
    assert class_names(10, path) == class_names(10, None, path) == expected
    assert class_names(100, path) is None


def test_names_have_no_comments_and_their_order() -> None:
    names = dataset_class_names("imagenet")
    assert (len(names), len(dataset_class_names("cifar10"))) == (1000, 10)
    assert not any(name.startswith("#") or not name.strip() for name in names)
    synsets = imagenet_synsets()
    assert list(synsets) == sorted(synsets)
    assert tuple(synsets.values()) == names
    assert synsets["n01440764"].startswith("tench")


def test_official_files_say_or_are_taken_for_imagenet(golden: Path) -> None:
    """What was renamed and records no data set, with 1000 classes; what records another one is that."""
    official = read_official(golden / "edm-tiny-cond.pkl")

    def names(classes: object, dataset: dict[str, object] | None, name: str = "renamed.pkl") -> list[str] | None:
        changed = replace(
            official, path=Path(name), arguments=official.arguments | {"label_dim": classes}, dataset=dataset
        )
        return official_class_names(changed)

    imagenet, cifar10 = (list(dataset_class_names(name)) for name in ("imagenet", "cifar10"))
    assert names(1000, None) == names(1000, {"resolution": 64}) == imagenet
    assert names(1000, {"path": "/data/mine.zip"}) is None
    assert names(10, {"path": "/data/cifar10-32x32.zip"}) == names(10, {"name": "cifar10"}) == cifar10
    assert names(10, None, "edm-cifar10.pkl") == cifar10
    assert names(10, None) is names("many", None) is None
