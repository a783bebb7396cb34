"""Words that sentences share."""

import pytest

from edmdistill.errors import counted


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (2000, "network evaluation", "2,000 network evaluations"),
        (1, "class", "1 class"),
        (10, "class", "10 classes"),
        (2, "batch", "2 batches"),
    ],
)
def test_a_noun_goes_with_its_number(number: int, noun: str, expected: str) -> None:
    assert counted(number, noun) == expected
