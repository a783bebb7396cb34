"""Untrusted text in Markdown with front matter, and in HTML: it stays text, whatever it holds.

Secrets in URLs are removed.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

from edmdistill.errors import printable, without_secrets

_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
"""Markup within a line of Markdown; an underscore within a word is none."""


def front_matter(fields: Mapping[str, object]) -> str:
    """Returns the front matter of a README.md for the Hub; fields that are None are left out."""
    from huggingface_hub.repocard_data import CardData

    return f"---\n{CardData(**_clean(fields)).to_yaml()}\n---\n"  # type: ignore[arg-type]  # fields of any names


def _clean(value: object) -> object:
    if isinstance(value, str):
        return _public(value)
    if isinstance(value, Mapping):
        return {name: _clean(inner) for name, inner in value.items() if inner is not None}
    return [_clean(inner) for inner in value] if isinstance(value, Sequence) else value


def markdown(text: str) -> str:
    """Returns Markdown that shows a text in a line, a list item or a table cell."""
    return _SPECIAL.sub(r"\\\g<0>", html.escape(_public(text), quote=False))


def code(text: str) -> str:
    """Returns inline code in Markdown."""
    text = _public(text)
    fence = _fence(text, 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Returns a code block in Markdown, between more backticks than the text has in a row."""
    text = _lines(text)
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _public(text: str) -> str:
    return printable(without_secrets(text))


def _lines(text: str) -> str:
    """Returns a text of several lines, each of them printable."""
    return "\n".join(map(_public, text.expandtabs().split("\n")))


def _fence(text: str, least: int) -> str:
    """Returns more backticks than the text has in a row."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def escape(text: str) -> str:
    """Returns HTML that shows a text, in an element or in a quoted attribute; line ends stay."""
    return html.escape(_lines(text))
