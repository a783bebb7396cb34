"""How a schedule was chosen."""

import pytest

from edmdistill.checkpoints.tuning import Tuning


def tuned(**changes: object) -> Tuning:
    facts = {"metric": "fid", "protocol": "digits", "reference": None, "gamma": 1.0, "n": 5000, "source_sha256": None}
    facts |= {"search_seeds": "0-4999", "held_out_seeds": "5000-14999", "schedules": 3, "images": 45_000}
    facts |= {"sigmas": (80.0, 2.0), "before": (80.0, 5.0), "values": (2.0, 2.2), "before_values": (3.0, 3.2)}
    return Tuning(**facts | {"gain": 1.0, "spread": 0.1} | changes)  # type: ignore[arg-type]


def test_it_is_confirmed_by_more_than_the_spread() -> None:
    assert tuned().confirmed
    assert not tuned(gain=0.1).confirmed
    assert tuned().words == "fid 3.1 ± 0.14 -> 2.1 ± 0.14 on 2 x 5,000 held-out seeds"
    assert tuned(values=(), before_values=()).words == ""


@pytest.mark.parametrize("values", [(2.0,), (2.0, 2.1, 2.2), ()])
def test_both_schedules_are_measured_as_often(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"there are {len(values)} and 2 measurements of a tuning"):
        tuned(values=values)
    with pytest.raises(ValueError, match="there are 1 and 1 measurements of a tuning"):
        tuned(values=(1.0,), before_values=(2.0,))  # which have no spread
