import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.draws import CALLS, LAYERS, PIECE, Draws, normal, uniform, words

ENTROPY = [3, 1, 4]


def word(key: int, i: int) -> int:
    """Returns word i of a stream by the published algorithm, in Python's integers."""
    z = (key + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
    for _ in range(2):
        z = (z ^ (z >> 32)) * 0xDABA0B6EB09322E3 % 2**64
    return z ^ (z >> 32)


@given(keys=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), piece=st.integers(0, 2**24 - 1))
def test_words_are_those_of_splitmix_with_lea64(keys: list[int], piece: int) -> None:
    drawn = words(torch.tensor(keys), 3, piece)
    expected = [[word(key, piece * PIECE + i) for i in range(3)] for key in keys]
    assert [[number % 2**64 for number in row] for row in drawn.tolist()] == expected


def test_known_answers() -> None:
    """Pinned: every run's numbers follow from these."""
    pinned = [5397241335645105076, 10036195605256929896, 3934985712188481685]
    assert words(torch.tensor([1234567]), 3)[0].tolist() == [n - 2**64 if n >= 2**63 else n for n in pinned]
    draws = Draws(ENTROPY, 2)
    assert draws.uniform().tolist() == [0.16326828721589204, 0.41507481689555537]
    np.testing.assert_allclose(draws.normal().numpy(), [1.030958375141545, -0.9350859637048228], rtol=1e-12)
    assert draws.common() == 0.5688516199258106
    assert draws.dropout().tolist() == [-7180684846810378104, 3061538778147868958]


def everything(draws: Draws) -> list[torch.Tensor]:
    x = torch.zeros(len(draws), 2, 3)
    return [
        draws.uniform(),
        draws.normal(),
        draws.normal_like(x, 0.5),
        draws.uniform(2, dtype=torch.float32),
        draws.dropout(),
    ]


@given(batch=st.integers(1, 200), data=st.data())
def test_a_row_gets_the_same_numbers_in_every_part_of_the_batch(batch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, batch - 1))
    stop = data.draw(st.integers(start + 1, batch))
    part = everything(Draws(ENTROPY, batch, slice(start, stop)))
    for alone, whole in zip(part, everything(Draws(ENTROPY, 200)), strict=True):
        torch.testing.assert_close(alone, whole[start:stop], rtol=1e-6, atol=0)


def test_rows_calls_and_batches_have_different_numbers() -> None:
    batches = [Draws(entropy, 128) for entropy in ([0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0])]
    numbers = torch.cat([draws.normal() for draws in batches] + [draws.normal() for draws in batches])
    assert len(numbers.unique()) == len(numbers)


def test_calls_and_passes_have_separate_pieces() -> None:
    """The key of a pass is the row's, moved on by whole pieces."""
    draws = Draws(ENTROPY, 3)
    row = draws._keys
    for number in range(3):
        assert torch.equal(words(draws.dropout(), 5, 7), words(row, 5, CALLS + number * LAYERS + 7))
    assert torch.equal(draws.dropout(advance=False), draws.dropout())
    twice, again = draws.dropout(advance=False, times=2), draws
    assert torch.equal(twice, torch.cat([again.dropout(), again.dropout()]))
    assert (draws.uniform() != draws.uniform()).all()


def test_values_of_some_rows_in_their_place() -> None:
    """The mean over parts, by their rows, is the mean of all."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    parts = [(rows, Draws(0, 5, rows).in_batch(values[rows])) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(whole * len(values[rows]) / 5 for rows, whole in parts), values)


def test_what_is_asked_for_is_drawn() -> None:
    """Two normal numbers come from a word, half of them before the other half; the last of an odd number is left."""
    draws, again = Draws(ENTROPY, 2), Draws(ENTROPY, 2)
    for dtype in (torch.float32, torch.float64):
        number = draws.uniform(3, dtype=dtype)
        assert (number.dtype, number.shape) == (dtype, (2, 3))
        assert torch.equal(number, uniform(again._words(3), dtype))
        numbers = draws.normal(3, dtype=dtype)
        assert (numbers.dtype, numbers.shape) == (dtype, (2, 3))
        assert torch.equal(numbers, normal(again._words(2), dtype)[:, :3])
        noise = draws.normal_like(torch.zeros(2, 1, 5, dtype=dtype), std=0.5)
        assert torch.equal(noise, again.normal(1, 5, dtype=dtype) * 0.5)
    repeated = draws.dropout(times=2), draws.dropout()
    assert torch.equal(torch.cat(repeated), again.dropout(times=3))


def test_words_are_random() -> None:
    """Of 16 million lanes of 16 bits: frequencies; correlations of neighbors in streams, rows, calls and lanes."""
    w = torch.stack([words(Draws(ENTROPY, 1000).dropout(), 2000, call) for call in range(2)])
    lanes = w.view(torch.int16).unflatten(-1, (-1, 4)).double() / 2**15
    counts = np.bincount((w.view(torch.int16).numpy().ravel() >> 6) + 512, minlength=1024)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi2 - 1023) < 5 * math.sqrt(2 * 1023)
    pairs = [(lanes[0], lanes[1])] + [(lanes.narrow(d, 1, lanes.shape[d] - 1), lanes.narrow(d, 0, lanes.shape[d] - 1))
             for d in (1, 2, 3)]  # fmt: skip
    for a, b in pairs:
        assert abs((a * b).mean()) * 3 * math.sqrt(a.numel()) < 5
        # Whether both are extreme, which dropout looks at.
        both = ((a < -0.8) & (b < -0.8)).double().mean()
        assert abs(both - 0.01) < 5 * math.sqrt(0.01 / a.numel())


def test_uniform_numbers() -> None:
    edges = torch.tensor([-(2**63), 2**63 - 1, 0])
    assert uniform(edges).tolist() == [0, 1 - 2**-53, 0.5]
    assert uniform(edges, torch.float32).tolist() == [0, 1 - 2**-24, 0.5]
    numbers = np.sort(Draws(0, 100_000).uniform().numpy())
    assert np.abs(numbers - np.arange(100_000) / 100_000).max() < 1.95 / math.sqrt(100_000)  # Kolmogorov, 0.1%


def test_normal_numbers() -> None:
    numbers = Draws(0, 1000).normal(1000)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((numbers**power).mean() - mean) < 5 * math.sqrt(variance / 1e6)
    ranks = torch.special.ndtr(numbers.flatten().sort()[0])
    assert (ranks - torch.arange(1e6) / 1e6).abs().max() < 1.95 / 1000
    sines, cosines = numbers.chunk(2, dim=1)
    for a, b in ((sines, cosines), (numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs((a * b).mean()) * math.sqrt(a.numel()) < 5
        assert abs((a**2 * b**2).mean() - 1) * math.sqrt(a.numel() / 8) < 5


def test_normal_numbers_hardly_depend_on_the_library() -> None:
    """With numpy's log, sin and cos instead of torch's: in float32, one number in 10^5 may differ, by one ulp."""
    w = words(torch.arange(100), 5000)
    low, high = (half.numpy().astype(np.float64) for half in w.view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1))
    radius, angle = np.sqrt(-2 * np.log((low + 2**31 + 0.5) / 2**32)), high / 2**32 * 2 * np.pi
    expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)
    drawn = normal(w, torch.float32).numpy()
    differs = drawn != expected
    assert differs.mean() < 1e-5
    np.testing.assert_array_max_ulp(drawn[differs], expected[differs], 1)
    assert np.isfinite(normal(torch.tensor([[-(2**63), 2**63 - 1, 0, -1, 2**31 - 1, -(2**31)]])).numpy()).all()


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers() -> None:
    cpu, gpu = (Draws(ENTROPY, 64, slice(8, 40), device) for device in ("cpu", "cuda"))
    assert torch.equal(cpu.uniform(3, 64, 64), gpu.uniform(3, 64, 64).cpu())
    assert torch.equal(cpu.dropout(), gpu.dropout().cpu())
    a, b = (draws.normal(3, 256, 256, dtype=torch.float32).cpu().numpy() for draws in (cpu, gpu))
    assert (a != b).mean() < 1e-6
    np.testing.assert_array_max_ulp(a, b, 1)


def test_the_meta_device_has_shapes_only() -> None:
    draws = Draws(0, 100, slice(10, 30), "meta")
    assert draws.common() == 0.5
    assert draws.uniform().shape == (20,)
    assert draws.normal(3).shape == (20, 3)
    assert draws.normal_like(torch.empty(20, 3, 4, 4, device="meta")).device.type == "meta"
