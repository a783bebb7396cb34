"""Options with commas in them are split in one way."""

from __future__ import annotations

from typing import Any

import click
import pytest

from edmdistill.cli.types import CommaList, Count, NameList, NumberList


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (CommaList(), " nll , fid", ["nll", "fid"]),
        (NumberList(Count(1), "1,2"), "4, 2 ,4", [4, 2, 4]),
        (NameList(("ema", "teacher")), "teacher, ema,teacher", ("teacher", "ema")),
        (NameList(("ema",)), (), ()),
    ],
)
def test_spaces_around_entries_are_none_of_them(kind: CommaList, text: Any, expected: object) -> None:
    assert kind.convert(text, None, None) == expected


@pytest.mark.parametrize("text", [",", "1,", ",1", "1,,2", "1, ,2"])
@pytest.mark.parametrize(
    "kind", [CommaList(), NumberList(Count(1), "1,2"), NameList("12")], ids=lambda kind: type(kind).__name__
)
def test_an_empty_entry_is_no_entry(kind: CommaList, text: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{text}' has an empty entry: write one comma between two entries"):
        kind.convert(text, None, None)


def test_an_empty_list() -> None:
    with pytest.raises(click.BadParameter, match="' ' is an empty list: give it an entry"):
        CommaList().convert(" ", None, None)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5e4", 50_000),
        ("200E6", 200_000_000),
        ("3.0", 3),
        ("1.5e1", 15),
        ("1e60", 10**60),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_a_whole_number_may_have_an_exponent(text: str, number: int) -> None:
    assert Count(1).convert(text, None, None) == number


@pytest.mark.parametrize("text", ["1.5", "1e-3", "inf", "nan", "1e999999999", "", "e5"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a valid whole number"):
        Count(1).convert(text, None, None)
