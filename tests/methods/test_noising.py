"""Times of noise levels, and the noise that one-step generation starts from."""

import math

import pytest
import torch

from edmdistill.draws import Draws
from edmdistill.methods.noising import initial_noise, time_of_rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_times_are_in_double_where_the_images_are(dtype: torch.dtype) -> None:
    t = time_of_rows(torch.zeros(3, 1, 2, 2, dtype=dtype), 80.0, 0.5)
    assert (t.dtype, t.tolist()) == (torch.float64, [math.atan(160)] * 3)
    assert time_of_rows(torch.zeros(3, 1, 2, 2, device="meta"), 80.0, 0.5).device.type == "meta"


def test_the_first_input_has_the_level_s_standard_deviation_and_no_data() -> None:
    x_t, t = initial_noise(torch.full((400, 1, 4, 4), 7.0), 0.5, Draws(0, 400), 0.5)
    assert float(x_t.std()) == pytest.approx(0.5 * 0.5**0.5, rel=0.05)
    assert float(x_t.mean()) == pytest.approx(0, abs=0.02)
    torch.testing.assert_close(0.5 * t.tan(), torch.full_like(t, 0.5))
