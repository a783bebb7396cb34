"""Logs of lines: a torn one never was, a damaged one is skipped and told, and what comes after is kept."""

import json
import math
from pathlib import Path
from typing import TypedDict

import pytest

from edmdistill.jsonl import append_line, read_lines, truncate_lines


class Line(TypedDict, total=False):
    images: int
    loss: float


def written(path: Path, *lines: str, torn: str = "") -> Path:
    path.write_text("".join(line + "\n" for line in lines) + torn)
    return path


def lines(*images: int) -> list[str]:
    return [json.dumps({"images": each}) for each in images]


@pytest.mark.parametrize("torn", ["", "{", '{"images": 3}', '{"images'])
@pytest.mark.parametrize("before", [(), (1,), (1, 2)], ids=len)
def test_a_line_follows_the_last_whole_one(before: tuple[int, ...], torn: str, tmp_path: Path) -> None:
    log = written(tmp_path / "log", *lines(*before), torn=torn)
    said: list[str] = []
    assert read_lines(log, Line, on_message=said.append) == [{"images": each} for each in before]
    append_line(log, {"images": 9})
    append_line(log, {"images": 10})
    assert log.read_text().splitlines() == lines(*before, 9, 10)
    assert said == []


def test_a_log_is_made_by_its_first_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert read_lines(log, Line) == []
    truncate_lines(log, Line, lambda line: False)
    assert not log.exists()
    append_line(log, {"loss": math.inf})
    append_line(log, {"loss": math.nan})
    first, second = read_lines(log, Line)
    assert (first["loss"], math.isnan(second["loss"])) == (math.inf, True)


@pytest.mark.parametrize(
    "damaged", ["", "{", "[1]", '{"images": "two"}', '{"loss": 1}', "\0" * 9, "[" * 100_000], ids=lambda text: text[:9]
)
def test_damaged_lines_are_told_by_their_number_and_skipped(damaged: str, tmp_path: Path) -> None:
    """Of another type, without a key that a line must have, or no JSON."""
    log = written(tmp_path / "log", *lines(1), damaged, *lines(2), damaged)
    said: list[str] = []
    found = read_lines(log, Line, ["images"], said.append)
    assert found == [{"images": 1}, {"images": 2}]
    assert said == [f"{log}: line {number} is damaged and is skipped." for number in (2, 4)]


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        (9, [*lines(1), "damaged", *lines(2, 5)]),
        (4, [*lines(1), "damaged", *lines(2)]),
        (1, lines(1)),
        (0, []),
    ],
)
def test_a_log_is_cut_before_the_first_line_that_is_not_kept(kept: int, left: list[str], tmp_path: Path) -> None:
    """With damaged lines at its new end; others stay, and what comes later goes, were it to be kept or not."""
    log = written(tmp_path / "log", *lines(1), "damaged", *lines(2, 5), "damaged", torn="{")
    truncate_lines(log, Line, lambda line: line["images"] <= kept, on_message=lambda sentence: None)
    assert log.read_text().splitlines() == left
    log = written(tmp_path / "log", *lines(1, 9, 2))
    truncate_lines(log, Line, lambda line: line["images"] < 9)
    assert log.read_text().splitlines() == lines(1)
