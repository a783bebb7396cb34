"""CoSIM's options: what follows from them, and what is refused."""

from typing import Any

import msgspec
import pytest

from edmdistill.methods.cosim_config import CoSIMConfig


@pytest.mark.parametrize("coef", [0.5, 0.75, 1.0, 1.2])
def test_beta(coef: float) -> None:
    assert CoSIMConfig(coef=coef).beta == pytest.approx(1 / (2 * coef))


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0},
        {"alpha": -1.2},
        {"coef": 0},
        {"coef": -1, "force": True},
        {"coef": 0.49},
        {"R": 0},
        {"share_to_max": 1.1},
        {"anchor_sigma": 0.3},
        {"anchor_sigma": -0.3, "order": "t"},
        {"fisher_sigma": 1.0},
        {"r_s_max": 0},
        {"weight": "none"},
        {"lambda": 0.5},
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(options, CoSIMConfig)


def test_coef_below_a_half_needs_force() -> None:
    with pytest.raises(ValueError, match=r"coef 0\.4 is below \.5.*force = true"):
        CoSIMConfig(coef=0.4)
    assert CoSIMConfig(coef=0.4, force=True).beta == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("alpha", "coef", "derived", "warned"),
    [
        (1.2, 1.0, "beta 0.5, lambda -0.167 (eq. 15) or 1 (eq. 12); eq. 38's factor is 0.2", False),
        (1.0, 0.75, "beta 0.667, lambda -0.25 (eq. 15) or 0.5 (eq. 12); eq. 38's factor is 0.222", False),
        (1.2, 0.5, "beta 1, lambda -0.583 (eq. 15) or 0 (eq. 12); eq. 38's factor is -0.2", True),
        (1.0, 0.5, "beta 1, lambda -0.5 (eq. 15) or 0 (eq. 12); eq. 38's factor is 0", True),
    ],
)
def test_notes(alpha: float, coef: float, derived: str, warned: bool) -> None:
    notes = CoSIMConfig(alpha=alpha, coef=coef).notes()
    assert notes[0] == f"alpha {alpha:g} and coef {coef:g} give {derived}"
    assert CoSIMConfig(coef=coef, gradient="kl").notes() == ()
    assert CoSIMConfig(alpha=alpha, coef=coef, gradient="kl", fisher_sigma=1.0).notes() == notes
    assert [("diverge" in note and "raise coef" in note) for note in notes[1:]] == [True] * warned
