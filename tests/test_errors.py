"""Words that sentences share."""

import pytest

from edmdistill.errors import EdmDistillError, causes, counted, duration


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


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1e-6, "less than 0.01 seconds"),
        (0.052, "0.05 seconds"),
        (1, "1.00 seconds"),
        (89, "89 seconds"),
        (90, "1.5 minutes"),
        (5400, "1.5 hours"),
        (1.4 * 86400, "33.6 hours"),
        (1234 * 86400, "1,234.0 days"),
    ],
)
def test_a_duration_has_the_unit_that_reads(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_a_word_without_end_has_its_ends() -> None:
    text = str(EdmDistillError(f"there is no {'a' * 5000 + 'z'}: choose another"))
    assert len(text) < 700
    assert text.startswith("there is no aaa")
    assert text.endswith("aaz: choose another")
    path = f"/{'/'.join(['folder'] * 100)}"
    assert path in str(EdmDistillError(f"{path} does not exist"))


def test_causes_of_an_error_that_was_raised_from_itself() -> None:
    refused, wrapped = OSError("refused"), EdmDistillError("a file")
    wrapped.__cause__, refused.__context__ = refused, wrapped
    assert [*causes(wrapped)] == [wrapped, refused]
    refused.__cause__ = refused
    assert [*causes(refused)] == [refused]
