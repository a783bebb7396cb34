"""What a network is called with: the same numbers in every form, and one sentence for what is none of them."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.errors import EdmDistillError
from edmdistill.networks.inputs import (
    class_vectors,
    classes_of,
    label_vectors,
    levels,
    require_earlier,
    require_images,
)

TIMES = st.floats(0, math.pi / 2)
NETWORK: Any = SimpleNamespace(img_channels=3, arguments={"channel_mult": [1, 2, 2]})


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_classes_are_the_same_in_every_form(classes: list[int]) -> None:
    count = len(classes)
    expected = torch.eye(7)[classes]
    for form in (classes, np.array(classes), torch.tensor(classes, dtype=torch.uint8), expected, expected.double()):
        found = label_vectors(form, 7, count)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert torch.equal(label_vectors(classes[0], 7, count), expected[:1].expand(count, 7))
    assert torch.equal(label_vectors(classes[:1], 7, count), expected[:1].expand(count, 7))
    assert torch.equal(class_vectors(torch.tensor(classes), 7), expected)
    assert torch.equal(class_vectors(torch.tensor(classes[0]), 7), expected[:1])
    assert torch.equal(class_vectors(expected.to(torch.int64), 7), expected)


def test_vectors_keep_what_is_no_class() -> None:
    mixed = torch.tensor([[0.25, 0.75], [0.0, 0.0]])
    assert torch.equal(label_vectors(mixed, 2, 2), mixed)


def test_without_labels_or_classes_there_is_no_vector() -> None:
    x = torch.zeros(2, 3, 8, 8)
    assert classes_of(x, None, 7) is None
    assert classes_of(x, [1, 2], 0) is None
    found = classes_of(x, [1, 2], 7)
    assert found is not None
    assert found.argmax(1).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("labels", "label_dim", "sentence"),
    [
        (3, 0, "this network is unconditional: leave them out"),
        (7, 7, "class 7 does not exist: this network's classes run from 0 to 6"),
        ([0, -1], 7, "class -1 does not exist"),
        ([0, 1, 2], 7, r"labels of shape \[3\] do not fit 2 samples: give one class, one for each, or .*\[2, 7\]"),
        ([0.0, 1.0], 7, r"labels of shape \[2\] do not fit"),
        (torch.zeros(2, 6), 7, r"labels of shape \[2, 6\] do not fit"),
        ("cat", 7, "labels = 'cat' are no classes, which are numbers from 0"),
        ([[1], [2, 3]], 7, "are no classes"),
    ],
)
def test_what_is_no_label_is_refused(labels: Any, label_dim: int, sentence: str) -> None:
    with pytest.raises(EdmDistillError, match=sentence):
        label_vectors(labels, label_dim, 2)


@pytest.mark.parametrize("size", [(4, 4), (8, 12)])
def test_images_of_sizes_that_halve_are_taken(size: tuple[int, int]) -> None:
    require_images(torch.zeros(2, 3, *size, dtype=torch.bfloat16), NETWORK)


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (np.zeros((2, 3, 8, 8)), r"must be a tensor of floats, \[B,3,H,W\]"),
        (torch.zeros(3, 8, 8), "must be a tensor of floats"),
        (torch.zeros(2, 1, 8, 8), "must be a tensor of floats"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "must be a tensor of floats"),
        (torch.zeros(2, 3, 8, 6), "must have a height and a width that are multiples of 4"),
        (torch.zeros(2, 3, 0, 8), "multiples of 4"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(x: Any, sentence: str) -> None:
    with pytest.raises(EdmDistillError, match=sentence):
        require_images(x, NETWORK)


@given(st.lists(TIMES, min_size=2, max_size=4))
def test_times_are_the_same_in_every_form(times: list[float]) -> None:
    for form in (times, np.array(times), torch.tensor(times, dtype=torch.float64), torch.tensor(times)[:, None, None]):
        torch.testing.assert_close(levels(form, "t", len(times)).flatten().double(), torch.tensor(times).double())
    assert levels(times[0], "t", len(times)).shape == ()


@pytest.mark.parametrize("form", [float, lambda x: [0.5, x], lambda x: torch.tensor([0.5, x]), np.float64])
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("t", -0.1, r"t = -0.1 must be in \[0, pi/2\]; edmdistill.trigflow.sigma_to_time makes times of noise levels"),
        ("s", 2.5, r"s = 2.5 must be in \[0, pi/2\]"),
        ("sigma", 0.0, "sigma = 0 must be above 0 and finite"),
        ("sigma", math.inf, "sigma = inf must be above 0 and finite"),
        ("t", math.nan, "t = nan must be in"),
        ("w", -1.0, "w = -1 must be at least 0"),
        ("w", math.inf, "w = inf must be at least 0 and finite"),
    ],
)
def test_a_number_out_of_range_is_refused_in_every_form(form: Any, name: str, value: float, sentence: str) -> None:
    with pytest.raises(EdmDistillError, match=sentence):
        levels(form(value), name, None)


@pytest.mark.parametrize("value", [[0.1, 0.2, 0.3], torch.zeros(3), "0.1", [[0.1], [0.2, 0.3]], None])
def test_another_number_of_levels_is_refused(value: Any) -> None:
    with pytest.raises(EdmDistillError, match="must be a number, or 2, one for each image"):
        levels(value, "t", 2)


def test_the_ends_of_a_range_are_in_it() -> None:
    """Half of pi is rounded upward in float32."""
    end = torch.tensor(math.pi / 2)
    assert float(end) > math.pi / 2
    for name, value in (("t", 0.0), ("t", end), ("s", 0.0), ("s", end), ("w", 0.0)):
        assert levels(value, name, 1) == value
    with pytest.raises(EdmDistillError, match="t = 2 must be"):
        levels([0.1, 2.0], "t", 2)


def test_the_sentence_names_the_late_jump() -> None:
    with pytest.raises(EdmDistillError, match=r"s = 0\.9 is after t = 0\.5"):
        require_earlier(torch.tensor([0.1, 0.9]), torch.tensor([0.6, 0.5]))
    with pytest.raises(EdmDistillError, match=r"s = 0\.9 is after t = 0\.5"):
        require_earlier(torch.tensor([0.1, 0.9]), torch.tensor(0.5))


@given(st.lists(st.tuples(TIMES, TIMES), min_size=1, max_size=4))
def test_a_jump_leads_to_an_earlier_time_or_stays(pairs: list[tuple[float, float]]) -> None:
    early, late = (torch.tensor(times, dtype=torch.float64) for times in zip(*map(sorted, pairs), strict=True))
    require_earlier(early, late)
    require_earlier(early.float(), early[:, None, None, None])
    require_earlier(early.min(), late)
    if bool((late - early > 1e-5).any()):
        with pytest.raises(EdmDistillError, match=r"is after t = .*: give an s that is at most t"):
            require_earlier(late, early)
