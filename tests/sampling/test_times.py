import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.errors import EdmDistillError
from edmdistill.sampling.times import check_times, parse_times
from edmdistill.trigflow import time_to_sigma

RANGE = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}


@given(st.lists(st.floats(0.002, 80.0), min_size=1, max_size=8))
def test_noise_levels_come_back(sigmas: list[float]) -> None:
    sigmas.sort(reverse=True)
    times = parse_times(",".join(map(repr, sigmas)), **RANGE)
    torch.testing.assert_close(time_to_sigma(times, 0.5), torch.tensor(sigmas, dtype=torch.float64), rtol=1e-9, atol=0)


def test_radians_are_taken_as_they_are() -> None:
    assert parse_times("1.57rad, 1.1rad", **RANGE).tolist() == [1.57, 1.1]
    assert parse_times("80,1.1rad,0.002", **RANGE).tolist() == [math.atan(160), 1.1, math.atan(0.004)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "80,",
        "rad",
        "1.1 rads",
        "a",
        "80;2.5",
        "800",
        "0.001",
        "-1",
        "nan",
        "inf",
        "1,5",
        "1.5rad,80",
        "0rad",
        "1.6rad",
        "80,nanrad",
    ],
)
def test_parse_times_refuses(text: str) -> None:
    with pytest.raises(EdmDistillError, match="--t "):
        parse_times(text, **RANGE)


def test_check_times() -> None:
    assert check_times([math.pi / 2, 1.1, 1.1]).dtype == torch.float64


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1.1, 1.2], "must decrease"),
        ([1.6], r"\(0, pi/2\]"),
        ([1.1, 0.0], r"\(0, pi/2\]"),
        ([math.nan], r"\(0, pi/2\]"),
        ([], "at least one"),
        ([[1.1]], "at least one"),
    ],
)
def test_check_times_refuses(times: list[float], message: str) -> None:
    with pytest.raises(EdmDistillError, match=message):
        check_times(times)
