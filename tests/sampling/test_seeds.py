"""Streams that belong to samples, and the lists that name them."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.errors import EdmDistillError
from edmdistill.sampling import seeds as seeds_module
from edmdistill.sampling.seeds import MAX_SEED, SeededNoise, format_seeds, parse_seeds


def draws(seeds: list[int]) -> list[torch.Tensor]:
    """The order of the official scripts: latents, classes, then the sampler's noise in its own dtype."""
    noise = SeededNoise(seeds)
    latents = noise.normal((3, 8, 8))
    return [latents, noise.integers(10), noise.like(latents.to(torch.float64)), noise.like(latents)]


@given(st.lists(st.integers(0, MAX_SEED), min_size=2, max_size=5, unique=True))
def test_a_sample_owns_its_stream(seeds: list[int]) -> None:
    together = draws(seeds)
    alone = [draws([seed]) for seed in seeds]
    backwards = draws(seeds[::-1])
    for i, draw in enumerate(together):
        assert torch.equal(draw, torch.cat([sample[i] for sample in alone]))
        assert torch.equal(draw, backwards[i].flip(0))


def test_the_stream_is_the_generator_of_that_seed() -> None:
    rng = torch.Generator().manual_seed(7)
    latents, classes, wide, narrow = draws([7 + 2**32])  # the official scripts take seeds modulo 2^32
    assert torch.equal(latents[0], torch.randn(3, 8, 8, generator=rng))
    assert classes[0] == torch.randint(10, [], generator=rng)
    assert torch.equal(wide[0], torch.randn(3, 8, 8, generator=rng, dtype=torch.float64))
    assert torch.equal(narrow[0], torch.randn(3, 8, 8, generator=rng))


def test_seeds_are_distinct_up_to_the_last() -> None:
    first, *others = (draws([seed])[0] for seed in (7, 7 + 2**31, MAX_SEED))
    assert not any(torch.equal(first, other) for other in others)
    assert SeededNoise(range(20)).signs([8]).unique().tolist() == [-1, 1]


ranges = st.tuples(st.integers(0, 10**6), st.integers(0, 20))


@given(st.lists(ranges, min_size=1, max_size=6))
def test_parse_seeds_reads_what_was_written(parts: list[tuple[int, int]]) -> None:
    expected = [seed for first, more in parts for seed in range(first, first + more + 1)]
    text = ",".join(f"{first}-{first + more}" if more else f"{first}" for first, more in parts)
    if len(set(expected)) == len(expected):
        assert parse_seeds(text) == expected
    else:
        with pytest.raises(EdmDistillError, match="appears twice"):
            parse_seeds(text)


@given(st.text(alphabet="0123456789-, x", max_size=8))
def test_parse_seeds_gives_seeds_or_an_error_of_ours(text: str) -> None:
    with suppress(EdmDistillError):
        seeds = parse_seeds(text)
        assert seeds
        assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_lists_of_seeds_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert format_seeds([0, 1, 2, 100, 7, 8]) == "0-2,100,7-8"
    assert parse_seeds(f"{MAX_SEED - 1}-{MAX_SEED}") == [MAX_SEED - 1, MAX_SEED]
    monkeypatch.setattr(seeds_module, "MAX_SEEDS", 5)
    assert parse_seeds("0-2,8-9") == [0, 1, 2, 8, 9]
    for text in ("0-5", "0-2,7-9"):
        with pytest.raises(EdmDistillError, match="more than 5 seeds"):
            parse_seeds(text)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-2-3", "1.5", "0-3,2", f"{MAX_SEED + 1}"])
def test_parse_seeds_refuses(text: str) -> None:
    with pytest.raises(EdmDistillError):
        parse_seeds(text)
