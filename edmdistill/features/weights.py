"""Reads the weights of feature networks from the files that people have; nothing in a file is run."""

from __future__ import annotations

import json
import mmap
import zipfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from edmdistill.archives import Archive, load_legacy
from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.official_files import official_files
from edmdistill.checkpoints.store import load_tensors
from edmdistill.errors import CheckpointError
from edmdistill.pickles import Unreadable
from edmdistill.stored_tensors import StoredTensor

NOT_WEIGHTS = ("num_batches_tracked", "mask_token")
"""The ends of names of tensors that do not change what a network computes."""


@dataclass(frozen=True)
class Weights:
    """What a file or a folder of weights holds.

    Attributes:
        path: as it was given.
        tensors: by the names in the file.
        sha256: of the file.
        official: whether it is one of the official files.
        num_heads: of attention, where the file says it.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str
    official: bool
    num_heads: int | None = None


def read_weights(path: str | Path | None, kind: str, space: str) -> Weights:
    """Returns the weights in a file.

    Args:
        path: a .safetensors file, a file of torch.save, or a folder of transformers; None = the official file of
            that kind in the cache.
        kind: of the official files.
        space: the name of the feature space, for errors.
    Raises: CheckpointError: there is no such file, or it is damaged or no file of weights.
    """
    if path is None:
        path = next((found for file in official_files(kind) if (found := file.cached)), None)
        if path is None:
            raise CheckpointError(
                f"the feature space {space} needs its weights, which are not here: run `edmdistill fetch {kind}`, or "
                f"give a file by --weights {space}=FILE."
            )
    path = Path(path).expanduser()
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: give the file of the weights of {space}.")
    heads = None
    try:
        with file.open("rb") as opened:
            head = opened.read(16)
        if head[8:10] == b'{"':
            tensors, metadata = load_tensors(file)
            heads = _number(metadata.get("num_heads"))
        else:
            tensors = {name: stored.tensor() for name, stored in _stored(file).items()}
        if path.is_dir():
            heads = _number(json.loads((path / "config.json").read_text()).get("num_attention_heads"))
    except Unreadable as error:
        raise CheckpointError(f"{file} {error}.") from error
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    digest = sha256_file(file)
    official = digest in {one.sha256 for one in official_files(kind)}
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(NOT_WEIGHTS)}
    return Weights(path, kept, digest, official, heads)


def _number(text: object) -> int | None:
    """Returns a positive count that a file states, None if it states none.  Raises: ValueError: it is none."""
    if text is None:
        return None
    number = int(str(text))
    if not 0 < number < 1000:
        raise ValueError(f"it states {number} attention heads")
    return number


def _stored(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors in a file of torch.save, by name.

    Raises: Unreadable: it is damaged, or holds something else.  OSError: it cannot be read.
    """
    if zipfile.is_zipfile(path):
        archive = Archive(path)
        value = archive.load("data.pkl", "data", {})
    else:
        with path.open("rb") as file:
            value = load_legacy(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), {})
    if not isinstance(value, dict) or not value:
        raise Unreadable("holds no plain dict of tensors: give a file of weights (a state dict)")
    wrong = next((name for name, tensor in value.items() if not isinstance(tensor, StoredTensor)), None)
    if wrong is not None:
        raise Unreadable(f"holds no tensor as {str(wrong)[:60]!r}: give a file of weights (a state dict)")
    if sum(tensor.nbytes for tensor in value.values()) > 2 * path.stat().st_size:
        raise Unreadable("holds the same numbers many times: it is damaged or forged")
    return {str(name): tensor for name, tensor in value.items()}
