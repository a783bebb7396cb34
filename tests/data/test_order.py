"""The order of training as a pure function."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.data.order import indices


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 1000), length=st.integers(1, 50))
def test_each_epoch_visits_every_image_once(seed: int, epoch: int, length: int) -> None:
    assert sorted(indices(seed, epoch * length, length, length).tolist()) == list(range(length))


@given(
    seed=st.integers(0, 9),
    start=st.integers(0, 200),
    batches=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    length=st.integers(1, 30),
)
def test_the_order_does_not_depend_on_the_batches(seed: int, start: int, batches: list[int], length: int) -> None:
    whole = indices(seed, start, sum(batches), length)
    parts = [indices(seed, start + sum(batches[:i]), size, length) for i, size in enumerate(batches)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_order_is_pinned() -> None:
    """A change here would break the exact resume of every run that is under way."""
    assert indices(0, 8, 12, 10).tolist() == [5, 9, 7, 4, 5, 1, 9, 8, 6, 2, 0, 3]
