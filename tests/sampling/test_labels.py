import pytest
import torch

from edmdistill.errors import EdmDistillError
from edmdistill.networks.inputs import label_vectors
from edmdistill.sampling.labels import find_class, find_classes

NAMES = ["tench, Tinca tinca", "tree frog, tree-frog", "crane", "crane", "7"]


@pytest.mark.parametrize("labels", [2, [2], torch.tensor([2, 2]), [2, 2], torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0]])])
def test_label_vectors(labels: object) -> None:
    vectors = label_vectors(labels, 4, 2)
    assert vectors.dtype == torch.float32
    assert vectors.tolist() == [[0, 0, 1, 0]] * 2


def test_soft_labels_pass() -> None:
    soft = torch.tensor([[0.5, 0.5]])
    assert torch.equal(label_vectors(soft, 2, 1), soft)


@pytest.mark.parametrize(
    ("labels", "label_dim", "message"),
    [
        (4, 4, "class 4 does not exist: .* 0 to 3"),
        ([0, -1], 4, "class -1 does not exist"),
        ([0, 1, 2], 4, "do not fit 2 samples"),
        ([0.5, 0.5], 4, "do not fit"),
        (0, 0, "unconditional"),
    ],
)
def test_label_vectors_refuse(labels: object, label_dim: int, message: str) -> None:
    with pytest.raises(EdmDistillError, match=message):
        label_vectors(labels, label_dim, 2)


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("Tree Frog", 1),
        ("tree-frog", 1),
        ("tench, tinca tinca", 0),
        ("3", 3),
        ("7", 4),
        (" tench ", 0),
        ("tree", 1),
        ("tinca", 0),
    ],
)
def test_find_class(word: str, number: int) -> None:
    assert find_class(word, 5, NAMES) == number


@pytest.mark.parametrize(
    ("word", "names", "message"),
    [
        ("tree forg", NAMES, "did you mean 'tree frog'"),
        ("zebra crossing", NAMES, r"no class 'zebra crossing': classes are 0 \(tench, Tinca tinca\), 1 \(tree frog, "),
        ("crane", NAMES, r"means 2 classes, 2 \(crane\), 3 \(crane\): use the number"),
        ("5", NAMES, "class 5 does not exist"),
        ("frog", None, "no class names"),
    ],
)
def test_find_class_refuses(word: str, names: list[str] | None, message: str) -> None:
    with pytest.raises(EdmDistillError, match=message):
        find_class(word, 5, names)


def test_find_class_of_an_unconditional_network() -> None:
    with pytest.raises(EdmDistillError, match="unconditional"):
        find_class("frog", 0, None)


def test_numbers_are_lists_and_names_are_not() -> None:
    assert find_classes(["0,3-4", "Tree Frog", "tench, Tinca tinca", "7"], 5, NAMES) == [0, 3, 4, 1, 0, 4]
    assert find_classes([], 5, NAMES) == []
    for word, message in (
        ("0,5", "class 5 does not exist"),
        ("3-1", "run backwards"),
        ("1,tench", "no class '1,tench'"),
    ):
        with pytest.raises(EdmDistillError, match=message):
            find_classes([word], 5, NAMES)
