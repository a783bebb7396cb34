"""What of a repository a push made, and what it may not replace."""

import io

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edmdistill.checkpoints.layout import CARD
from edmdistill.publish.repository import (
    GRID,
    RepositoryContents,
    is_signed_picture,
    sign_card,
    signed_model,
    signed_png,
)

TEXT = "---\nlicence: mit\n---\n\n# A model\n"
PICTURE = signed_png(Image.linear_gradient("L").resize((8, 8)))


def changed(picture: bytes) -> bytes:
    """One pixel is another; the text of the PNG, with its signature, stays."""
    with Image.open(io.BytesIO(picture)) as image:
        image.load()
        signature, (x, y) = image.text, (3, 5)  # type: ignore[attr-defined]
        image.putpixel((x, y), 255 - image.getpixel((x, y)))
        info = PngInfo()
        for key, value in signature.items():
            info.add_text(key, value)
        image.save(data := io.BytesIO(), "png", pnginfo=info)
    return data.getvalue()


def test_a_card_shows_changes_of_itself_and_names_its_weights() -> None:
    card = sign_card(TEXT, "a" * 64).encode()
    assert signed_model(card) == "a" * 64
    assert signed_model(card.replace(b"\n", b"\r\n")) == "a" * 64  # as an editor of Windows saves it
    for other in (card + b"more", card.replace(b"A model", b"B model"), TEXT.encode(), b"", None):
        assert signed_model(other) is None


def test_a_picture_shows_changes_of_its_pixels() -> None:
    assert is_signed_picture(PICTURE)
    Image.new("L", (8, 8)).save(plain := io.BytesIO(), "png")
    for other in (changed(PICTURE), plain.getvalue(), PICTURE[:60], b""):
        assert not is_signed_picture(other)


@pytest.mark.parametrize("card", [sign_card(TEXT, "a" * 64).encode(), TEXT.encode(), None], ids=["ours", "other", "no"])
@pytest.mark.parametrize("picture", [PICTURE, changed(PICTURE), None], ids=["ours", "other", "no"])
def test_only_what_a_push_made_is_replaced_or_removed(card: bytes | None, picture: bytes | None) -> None:
    contents = RepositoryContents(card=card, picture=picture)
    foreign = [name for name, other in ((CARD, card == TEXT.encode()), (GRID, picture == changed(PICTURE))) if other]
    assert contents.by_hand((CARD, GRID)) == foreign
    assert contents.by_hand((CARD,)) == [name for name in foreign if name == CARD]
    assert contents.left_behind((CARD, GRID)) == []
    assert contents.left_behind((CARD,)) == ([GRID] if picture and not foreign else [])
