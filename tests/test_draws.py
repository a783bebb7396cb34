import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.draws import BLOCK, Draws

ENTROPY = [3, 1, 4]


def everything(draws: Draws) -> list[torch.Tensor]:
    x = torch.zeros(len(draws), 2, 3)
    return [draws.uniform(), draws.normal(), draws.normal_like(x, 0.5), draws.uniform(2, dtype=torch.float32)]


@given(batch=st.integers(1, 3 * BLOCK), data=st.data())
def test_a_row_gets_the_same_numbers_in_every_part_of_the_batch(batch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, batch - 1))
    stop = data.draw(st.integers(start + 1, batch))
    part = everything(Draws(ENTROPY, batch, slice(start, stop)))
    for mine, whole in zip(part, everything(Draws(ENTROPY, batch)), strict=True):
        assert torch.equal(mine, whole[start:stop])


def test_every_row_call_and_batch_has_numbers_of_its_own() -> None:
    batches = [Draws(entropy, 2 * BLOCK) for entropy in ([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0])]
    numbers = torch.cat([draws.normal() for draws in batches] + [draws.normal() for draws in batches])
    assert len(numbers.unique()) == len(numbers)


def test_seeds_of_rows_differ() -> None:
    assert len({Draws(ENTROPY, 100, slice(i, i + 1)).seed for i in range(100)}) == 100


def test_moments() -> None:
    draws = Draws(0, 100_000)
    uniform, normal = draws.uniform(), draws.normal()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean() == pytest.approx(1 / 2, abs=0.005)
    assert normal.mean() == pytest.approx(0, abs=0.015)
    assert normal.var() == pytest.approx(1, abs=0.02)
    # Neither rows of a block nor blocks go together.
    blocks = normal[: len(normal) // BLOCK * BLOCK].reshape(-1, BLOCK)
    assert abs(np.corrcoef(blocks[:-1].flatten(), blocks[1:].flatten())[0, 1]) < 0.015


def test_the_meta_device_has_shapes_without_numbers() -> None:
    draws = Draws(0, 100, slice(10, 30), "meta")
    assert draws.uniform().shape == (20,)
    assert draws.normal_like(torch.empty(20, 3, 4, 4, device="meta")).device.type == "meta"
