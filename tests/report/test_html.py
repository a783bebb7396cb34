"""Pieces of a page."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edmdistill.report import html

TEXT, SAFE = '<b> & "c"', "&lt;b&gt; &amp; &quot;c&quot;"


def test_texts_are_no_markup():
    pieces = [html.note(TEXT), html.code(TEXT), html.shell("a", TEXT), html.table([["", TEXT], [TEXT, "1"]])]
    assert [piece.count(SAFE) for piece in pieces] == [1, 1, 1, 2]
    assert not any("<b>" in piece for piece in pieces)
    assert html.shell("a", "b") == '<pre class="shell"><code>a</code><code>b</code></pre>'


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


HEAD = chunk(b"IHDR", (50_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0]))
HUGE = b"\x89PNG\r\n\x1a\n" + HEAD + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [b"", b"no picture", HUGE, None], ids=["empty", "text", "huge", "absent"])
def test_a_picture_that_cannot_be_read_is_said(content: bytes | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    assert html.picture(tmp_path / "a.png") == "<p>This picture cannot be read.</p>"


def test_a_torn_picture_is_said(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    assert html.picture(tmp_path / "whole.png").startswith('<img src="data:image/png;base64,')
    for end in (20, 40, 5000, len(whole) - 30):
        (tmp_path / "torn.png").write_bytes(whole[:end])
        assert html.picture(tmp_path / "torn.png") == "<p>This picture cannot be read.</p>"


def test_a_wide_picture_is_scaled_down(tmp_path: Path):
    Image.new("L", (3000, 100)).save(tmp_path / "wide.png")
    assert html.picture(tmp_path / "wide.png").endswith('" width="1200" height="40" alt="Samples">')
