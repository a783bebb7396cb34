"""Rejection keeps as many of each class as were asked for, and the best."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.rejection import candidates, sample_best
from edmdistill.sampling.seeds import MAX_SEED

CLASSES = 3


def draw(seeds: list[int], labels: Tensor) -> Tensor:
    """Images that hold their seed's two digits and their class."""
    return torch.stack([torch.tensor([[[seed % 16 * 16, seed // 16, int(c)]]]) for seed, c in zip(seeds, labels, strict=True)]).float() / 127.5 - 1  # fmt: skip # noqa: E501


def luck(seed: int) -> float:
    """How good the image of a seed is; many are as good as one another."""
    return -float((seed * 37 + 11) % 17)


def judge(images: Tensor) -> Tensor:
    """The luck of the seed that the image shows, in the column of the class that it shows; far better elsewhere."""
    values = images.flatten(1).tolist()
    scores = torch.full((len(images), CLASSES), 100.0)
    for row, (low, high, c) in enumerate(values):
        scores[row, c] = luck(low // 16 + 16 * high)
    return scores


@given(
    st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=12),
    st.floats(0, 0.9),
    st.integers(0, 40),
    st.integers(1, 9),
)
def test_exactly_as_many_of_each_class_and_the_best(asked: list[int], ratio: float, first: int, batch: int) -> None:
    seeds = [first + 2 * i for i in range(len(asked))]
    images, kept = sample_best(draw, judge, seeds, asked, ratio, batch=batch)
    shown = ((images + 1) * 127.5).round().flatten(1).long().tolist()
    assert [c for _, _, c in shown] == asked
    assert [low // 16 + 16 * high for low, high, _ in shown] == kept
    assert len(set(kept)) == len(kept)

    every = candidates(seeds, asked, ratio)
    for number, n in Counter(asked).items():
        pool = every.seeds[every.classes == number].tolist()
        assert len(pool) == pytest.approx(n / (1 - ratio), abs=1)
        assert len(pool) >= n / (1 - ratio) - 1e-6
        own = [seed for seed, c in zip(kept, asked, strict=True) if c == number]
        assert sorted(map(luck, own)) == sorted(map(luck, pool))[-n:]
        assert own == [seed for seed in pool if seed in own]


def test_no_rejection_is_plain_sampling() -> None:
    images, kept = sample_best(draw, judge, [5, 9, 2], [1, 0, 1], 0.0)
    assert kept == [5, 9, 2]
    assert torch.equal(images, draw([5, 9, 2], torch.tensor([1, 0, 1])))


def test_how_many_are_drawn() -> None:
    """The paper's 50 / (1 - r)."""
    every = candidates(range(100), [0] * 50 + [1] * 50, 0.8)
    assert Counter(every.classes.tolist()) == {0: 250, 1: 250}
    assert every.seeds.tolist() == list(range(500))
    assert len(candidates([0, 1, 2], [0, 0, 0], 0.7).seeds) == 10
    assert len(candidates([0], [0], 0.1).seeds) == 2
    assert candidates([MAX_SEED - 1], [0], 0.5).seeds.tolist() == [MAX_SEED - 1, MAX_SEED]


@pytest.mark.parametrize(
    ("seeds", "ratio", "message"),
    [([0], 1.0, "must be in"), ([0], -0.1, "must be in"), ([MAX_SEED], 0.5, "seeds end at")],
)
def test_what_cannot_be_drawn(seeds: list[int], ratio: float, message: str) -> None:
    with pytest.raises(EdmDistillError, match=message):
        candidates(seeds, [0], ratio)


def test_a_classifier_without_an_answer() -> None:
    with pytest.raises(EdmDistillError, match="NaN"):
        sample_best(draw, lambda images: judge(images) * float("nan"), [0], [0], 0.5)


def test_an_image_that_is_not_finite_comes_last() -> None:
    """Its picture would be black, which a classifier may take for the best of a class; a VAE takes no such latents."""
    broken = {0, 3}

    def draw_some_broken(seeds: list[int], labels: Tensor) -> Tensor:
        images = draw(seeds, labels)
        images[[seed in broken for seed in seeds]] = float("nan")
        return images

    def decode(images: Tensor) -> Tensor:
        assert images.isfinite().all()
        return to_uint8(images)

    def judge_alike(pictures: Tensor) -> Tensor:
        return torch.zeros(len(pictures), 1)

    images, kept = sample_best(draw_some_broken, judge_alike, [0, 1], [0, 0], 0.5, decode=decode)
    assert kept == [1, 2]
    assert images.isfinite().all()
    _, kept = sample_best(draw_some_broken, judge_alike, [0, 1], [0, 0], 0.0, decode=decode)
    assert kept == [0, 1]
