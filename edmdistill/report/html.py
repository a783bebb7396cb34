"""Pieces of a page: tables, notes, code and pictures as HTML, with every text escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from edmdistill.checkpoints.documents import escape

MAX_WIDTH = 1200  # pixels; a wider picture is scaled down


def table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Returns a table.

    Args:
        rows: the first is the head.
        kind: a class of the page's style for the cells, after a space.
    """
    head, *body = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f'<div class="scroll{kind}"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def code(text: str) -> str:
    return f'<pre class="scroll">{escape(text)}</pre>'


def shell(*commands: str) -> str:
    """Returns commands, each on lines of its own."""
    return f'<pre class="shell">{"".join(f"<code>{escape(command)}</code>" for command in commands)}</pre>'


def picture(file: Path) -> str:
    """Returns a picture from a file, in the page itself."""
    try:
        with Image.open(file) as image:
            image.thumbnail((MAX_WIDTH, 10 * MAX_WIDTH))
            image.save(data := io.BytesIO(), "png", optimize=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # SyntaxError: Pillow's, of a torn file
        return "<p>This picture cannot be read.</p>"
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{text}" width="{image.width}" height="{image.height}" alt="Samples">'
