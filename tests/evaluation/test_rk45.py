"""The Runge-Kutta method: scipy's on every row, and no row knows of another."""

import warnings

import pytest
import torch
from scipy.integrate import solve_ivp
from tolerance import assert_rounded
from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.evaluation.rk45 import rk45

STIFFNESS = torch.tensor([0.1, 3.0, 40.0, 0.0, 8.0], dtype=torch.float64)
STATES = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SPAN = 0.4, 1.9


def field(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """A forced pendulum of another stiffness in each row, which takes it from 3 to 50 steps."""
    k = STIFFNESS[rows]
    return torch.stack([y[:, 1], -k * torch.sin(y[:, 0]) + torch.cos(k * t), y[:, 0] * y[:, 1]], 1)


@pytest.mark.parametrize("size", [1, 0], ids=["random", "zero"])  # at 0 the first step is another
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-6])
def test_every_row_is_scipys(tolerance: float, size: int) -> None:
    ends, evaluations = rk45(field, size * STATES, *SPAN, rtol=tolerance, atol=tolerance)
    for row, (start, end) in enumerate(zip(size * STATES, ends, strict=True)):

        def alone(t: float, y, row: int = row):
            now = torch.tensor([t], dtype=torch.float64)
            return field(now, torch.from_numpy(y)[None], torch.tensor([row]))[0].numpy()

        theirs = solve_ivp(alone, SPAN, start.numpy(), rtol=tolerance, atol=tolerance)
        assert int(evaluations[row]) == theirs.nfev
        torch.testing.assert_close(end, torch.from_numpy(theirs.y[:, -1]), rtol=1e-11, atol=1e-11)
    assert len(set(evaluations.tolist())) >= 3


def test_no_row_knows_of_another() -> None:
    together, steps = rk45(field, STATES, *SPAN, rtol=1e-4, atol=1e-4)
    for row in range(len(STATES)):
        alone, own = rk45(lambda t, y, _, r=row: field(t, y, torch.full_like(_, r)), STATES[row : row + 1], *SPAN,
                          rtol=1e-4, atol=1e-4)  # fmt: skip
        assert_rounded(alone[0], together[row], 100 * int(steps[row]))  # vector units take sines in fours or eights
        assert own[0] == steps[row]


def test_a_row_that_has_arrived_is_left_alone() -> None:
    asked = torch.zeros(5, dtype=torch.int64)

    def counted(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        asked.index_add_(0, rows, torch.ones_like(rows))
        return field(t, y, rows)

    _, evaluations = rk45(counted, STATES, *SPAN, rtol=1e-4, atol=1e-4)
    assert torch.equal(asked, evaluations)


def test_the_order_is_5() -> None:
    """With a thousandth of the tolerance, a method of order 5 takes 1000^(1/5) = 4 times the steps."""
    _, few = rk45(field, STATES, *SPAN, rtol=1e-6, atol=1e-6)
    _, many = rk45(field, STATES, *SPAN, rtol=1e-9, atol=1e-9)
    assert 3.1 < float(many[2] / few[2]) < 4.5


def test_the_field_is_asked_within_the_span_alone() -> None:
    """Also where it is so flat that the first step would be longer."""
    asked: list[Tensor] = []

    def flat(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        asked.append(t)
        return 1e-4 * y

    rk45(flat, STATES, *SPAN, rtol=1e-3, atol=1e-3)
    assert torch.cat(asked).min() == SPAN[0]
    assert torch.cat(asked).max() == SPAN[1]


def test_a_step_to_where_the_field_is_not_finite_is_tried_again_shorter() -> None:
    """As by scipy: growth that saturates at 1, of which long steps would overshoot."""

    def growth(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return torch.where(y > 1.01, float("nan"), 20 * y * (1 - y))

    def alone(t: float, y):
        return growth(torch.tensor([t]), torch.from_numpy(y)[None], torch.zeros(1, dtype=torch.int64))[0].numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        theirs = solve_ivp(alone, SPAN, [0.01], rtol=1e-2, atol=1e-2)
    (end,), evaluations = rk45(growth, torch.tensor([[0.01]], dtype=torch.float64), *SPAN, rtol=1e-2, atol=1e-2)
    assert int(evaluations) == theirs.nfev
    assert float(end) == pytest.approx(float(theirs.y[0, -1]), rel=1e-11)


@pytest.mark.parametrize(("growth", "slope"), [(1.0, "nan"), (1.0, "inf"), (1e-3, "nan")])
def test_a_broken_field_ends_in_a_sentence_with_the_time_of_the_row_that_fails(growth: float, slope: str) -> None:
    """Also where it is so flat that the first step is looked for beyond that time."""

    def broken(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return torch.where((rows == 2) & (t > 1), float(slope), torch.where(rows == 0, 300.0, growth))[:, None] * y

    with pytest.raises(EdmDistillError, match="could not be solved at time 1: "):
        rk45(broken, STATES, *SPAN, rtol=1e-3, atol=1e-3)


def test_a_field_that_is_nowhere_finite_ends_in_a_sentence() -> None:
    with pytest.raises(EdmDistillError, match=r"could not be solved at time 0\.4: "):
        rk45(lambda t, y, rows: float("nan") * y, STATES, *SPAN, rtol=1e-3, atol=1e-3)
