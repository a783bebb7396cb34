"""Text in documents is shown as it is, and is no markup."""

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.checkpoints.documents import code, code_block, escape, front_matter, markdown

words = st.text("`a~ \n", max_size=12)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>R&D</b>", "&lt;b&gt;R&amp;D&lt;/b&gt;"),
        ("*a* [b](c) `d` | ~e~ $f$ \\", r"\*a\* \[b\](c) \`d\` \| \~e\~ \$f\$ " + "\\" * 2),
        ("_a_ half_life_images", r"\_a\_ half_life_images"),
    ],
)
def test_markup_is_text(text: str, shown: str) -> None:
    assert markdown(text) == shown
    assert escape(f'"{text[:3]}"\n') == f"&quot;{escape(text[:3])}&quot;\n"


@given(words)
def test_code_ends_where_its_text_does(text: str) -> None:
    """Between backticks that the text does not have in a row; those at its ends are kept apart by a space."""
    match = re.fullmatch(r"(`+)( ?)(.*?)\2\1", code(text), re.DOTALL)
    assert match is not None
    fence, space, inner = match.groups()
    assert fence not in re.findall("`+", inner)
    assert bool(space) or not (inner.startswith("`") or inner.endswith("`"))


@given(words)
def test_a_block_of_code_ends_where_its_text_does(text: str) -> None:
    first, *lines, last = code_block(text, "sh").split("\n")
    assert first == f"{last}sh"
    assert len(last) >= 3
    assert not any(last in line for line in lines)
    assert len(lines) == len(text.split("\n"))


def test_a_header_leaves_out_what_is_not_known() -> None:
    header = front_matter({"license": "mit", "base_model": None, "extra": {"a": None, "b": ["c", "x: y"]}})
    assert header.startswith("---\n")
    assert header.endswith("\n---\n")
    assert yaml.safe_load(header.strip("-\n")) == {"license": "mit", "extra": {"b": ["c", "x: y"]}}
