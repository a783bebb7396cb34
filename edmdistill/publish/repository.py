"""A repository on the Hub: what it holds, and what of it a push may not replace unasked.

What a push writes signs itself: later, only what still has its signature is replaced.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelInfo, hf_hub_download
from PIL import Image

from edmdistill.checkpoints.config import CheckpointConfig, read_config
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.errors import CheckpointError
from edmdistill.sampling.grid import save_grid

GRID = "samples.png"
SIGNATURE = re.compile(rb"(?m)^edmdistill_card: ([0-9a-f]{64})\nedmdistill_model: ([0-9a-f]{64})\n")
"""Lines of a card's header: sha256 of the card without them, and of the weights published with it."""
PICTURE_SIGNATURE = "edmdistill_picture"
"""The key of a PNG's text: sha256 of its pixels."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".onnx", ".pt2", ".h5", ".msgpack", ".gguf", ".npz")


class RepositoryContents(NamedTuple):
    """What a repository holds.

    Attributes:
        names: of its files.
        config: the downloaded config.json; None: it has none.
        card: the text of its README.md; None: it has none.
        model_sha256: of model.safetensors, if the Hub reports it.
        picture: the bytes of its samples.png; None: it has none.
    """

    names: tuple[str, ...] = ()
    config: Path | None = None
    card: bytes | None = None
    model_sha256: str | None = None
    picture: bytes | None = None

    def by_hand(self, names: Iterable[str]) -> list[str]:
        """Returns which of these files were not made by a push, or changed since; only card and picture are known."""
        edited = {
            CARD: self.card is not None and signed_model(self.card) is None,
            GRID: self.picture is not None and not is_signed_picture(self.picture),
        }
        return [name for name, by_hand in edited.items() if by_hand and name in names]

    def left_behind(self, names: Iterable[str]) -> list[str]:
        """Returns the files of an earlier push that a package of these files lacks."""
        # A card edited by hand may show the picture.
        return [] if GRID in names or self.picture is None or self.by_hand((CARD, GRID)) else [GRID]


def read_contents(repository: str, info: ModelInfo) -> RepositoryContents:
    """Reads a repository, without its weights."""
    names = tuple(file.rfilename for file in info.siblings or ())

    def download(name: str) -> Path | None:
        return Path(hf_hub_download(repository, name, revision=info.sha)) if name in names else None

    model = next((file.lfs for file in info.siblings or () if file.rfilename == MODEL), None)
    config, card, picture = map(download, (CONFIG, CARD, GRID))
    return RepositoryContents(
        names,
        config,
        card.read_bytes() if card else None,
        model.sha256 if model else None,
        picture.read_bytes() if picture else None,
    )


def other_model(contents: RepositoryContents, config: CheckpointConfig) -> str | None:
    """Describes another model in the repository; None: it has this model, an earlier state of it, or none."""
    if contents.config is None:
        if foreign := [name for name in contents.names if name != MODEL and name.endswith(WEIGHTS)]:
            return f"the weights of another program, {foreign[0]}"
        return "weights that edmdistill did not put there" if MODEL in contents.names else None
    try:
        published = read_config(contents.config.parent)
    except CheckpointError:
        return f"another program's model, with a {CONFIG} of its own"
    theirs, ours = _identity(published), _identity(config)
    if others := [name for name, value in ours.items() if theirs[name] != value]:
        differ = " and ".join(filter(None, [", ".join(others[:-1]), others[-1]]))
        return f"another model, {_describe(published)}; this is {_describe(config)}, with another {differ}"
    signed = signed_model(contents.card)  # None for a card edited by hand
    if signed and contents.model_sha256 not in (None, signed):
        return f"a {MODEL} that edmdistill did not put there"
    return None


def _identity(config: CheckpointConfig) -> dict[str, object]:
    """Returns the fields that further training, measuring and averaging do not change, by their names."""
    origin = config.provenance
    return {
        "stage": config.stage,
        "method": config.method,
        "recipe": config.recipe_hash,
        "source": origin.sha256,
        "parent": origin.parent,
        "guide": origin.guide,
        "init": origin.init,
    }


def _describe(config: CheckpointConfig) -> str:
    origin = config.provenance
    by = f" by {config.method}, recipe {config.recipe_hash or '-':.12}," if config.method else ""
    return f"a {config.stage}{by} from {origin.source} ({origin.sha256 or origin.parent or '-':.12})"


def sign_card(card: str, model_sha256: str) -> str:
    """Returns the card with a header that shows later changes of it, or of the weights beside it."""
    lines = f"edmdistill_card: {_digest(card.encode())}\nedmdistill_model: {model_sha256}\n"
    return card.replace("\n---\n", f"\n{lines}---\n", 1)


def signed_model(card: bytes | None) -> str | None:
    """Returns sha256 of the weights that a card was published with; None: the card was edited or is not ours."""
    text = (card or b"").replace(b"\r\n", b"\n")
    match = SIGNATURE.search(text)
    if match is None or _digest(SIGNATURE.sub(b"", text, count=1)) != match[1].decode():
        return None
    return match[2].decode()


def signed_png(picture: Image.Image) -> bytes:
    """Returns a picture as a PNG that shows later changes of its pixels."""
    save_grid(picture, data := io.BytesIO(), **{PICTURE_SIGNATURE: _digest(picture.tobytes())})
    return data.getvalue()


def is_signed_picture(data: bytes) -> bool:
    """Returns whether a picture is as `signed_png` wrote it."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            signature = picture.info.get(PICTURE_SIGNATURE)
            return signature is not None and signature == _digest(picture.tobytes())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # whatever Pillow says of a broken one
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
