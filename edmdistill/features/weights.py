"""Reads the weights of feature networks from the files that are in circulation, without running anything in them."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from edmdistill.archives import Archive, load_legacy
from edmdistill.atomic import expanded, require_no_pipe, sha256_file
from edmdistill.checkpoints.download import cache_folder, downloaded
from edmdistill.checkpoints.official_files import files_of
from edmdistill.checkpoints.persistence import STAND_INS, PersistentObject, state_dict, type_name
from edmdistill.checkpoints.store import load_tensors
from edmdistill.errors import CheckpointError
from edmdistill.features.script import is_script, script_tensors
from edmdistill.pickles import FORGED, Budget, StandIn, Unpickler, Unreadable
from edmdistill.stored_tensors import LEGACY_MAGIC, StoredTensor, mapped, read_storage

NOT_WEIGHTS = ("num_batches_tracked", "mask_token")
"""The ends of names of tensors that do not change what a network computes."""


@dataclass(frozen=True)
class FeatureWeights:
    """The content of a file or a folder of weights.

    Attributes:
        path: as it was given.
        tensors: by the names in the file, without what they all begin with.
        sha256: of the file.
        official: whether it is one of the official files.
        num_heads: of attention, where the file says it.
        script: whether the file is TorchScript, which holds the network's code too.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str
    official: bool
    num_heads: int | None = None
    script: bool = False


def read_weights(path: str | Path | None, kind: str, space: str) -> FeatureWeights:
    """Returns the weights in a file.

    Args:
        path: a .safetensors file, a file of torch.save or torch.jit.save, NVIDIA's pickle of a module, or a folder of
            transformers; None = the official file of that kind in the cache.
        kind: of the official files.
        space: the name of the feature space, for errors.
    Raises: CheckpointError: there is no such file, or it is damaged or no file of weights.
    """
    path = _find(path, kind, space)
    file, *others = [path / name for name in ("model.safetensors", "config.json")] if path.is_dir() else [path]
    for needed in (file, *others):
        require_no_pipe(needed)
    if missing := [needed for needed in (file, *others) if not needed.is_file()]:
        raise CheckpointError(
            f"{missing[0]} does not exist: give the file of the weights of {space}, or the whole folder"
        )
    heads, script = None, False
    try:
        digest = sha256_file(file)
        with file.open("rb") as opened:
            head = opened.read(16)
        if (stored := converted(digest)).exists():
            with downloaded(stored):
                tensors = load_tensors(stored)[0]
        elif head[8:10] == b'{"':
            tensors, metadata = load_tensors(file)
            heads = _count_heads(metadata.get("num_heads"))
        else:
            pickled, script = _stored(file)
            tensors = {name: tensor.tensor() for name, tensor in pickled.items()}
        if path.is_dir():
            heads = _count_heads(_read_config(path / "config.json").get("num_attention_heads"))
    except Unreadable as error:
        raise CheckpointError(f"{path} {error}") from error
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read ({error.strerror or error}): make it readable, or give a copy"
        ) from error
    official = digest in {one.sha256 for one in files_of(kind)}
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(NOT_WEIGHTS)}
    return FeatureWeights(path, _without_prefix(kept), digest, official, heads, script)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors without the names of up to four modules that hold the whole network, such as model. or module."""
    for _ in range(4):
        if len({name.partition(".")[0] for name in tensors}) == 1 and all("." in name for name in tensors):
            tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    return tensors


def _find(path: str | Path | None, kind: str, space: str) -> Path:
    """Returns the file of weights that is named, or the official one in the cache.

    Raises: CheckpointError: none is named, and the cache has none.
    """
    files = sorted(files_of(kind), key=lambda file: file.name != space)
    name = files[0].name
    weights_file = path or next((cached for file in files if (cached := file.cached)), None)
    if weights_file is None:
        raise CheckpointError(
            f"the feature space {space} needs its weights, which are not here: run `edmdistill fetch {name}`; eval, "
            f"sweep, tune-schedule, diagnose and data stats also take a file, by --weights {space}=FILE, and train by "
            f"--set evaluation.weights.{space}=FILE"
        )
    return expanded(weights_file)


def converted(sha256: str) -> Path:
    """Returns the place in the cache of the weights of a TorchScript file as safetensors, by the file's digest.

    They are stored once the network of those weights has been compared with the script.
    """
    return cache_folder() / "features" / f"{sha256}.safetensors"


def _read_config(path: Path) -> dict[str, object]:
    """Returns the config.json of a folder of transformers.  Raises: Unreadable: it is none.  OSError: there is none."""
    with path.open("rb") as file:
        text = file.read(2**20)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise Unreadable("has a config.json that transformers did not write: save the model there again")
    return config


def _count_heads(stated: object) -> int | None:
    """Returns the number of heads that a file states; None if it states none.  Raises: Unreadable: it is no number."""
    if stated is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,2}", str(stated)):
        raise Unreadable(f"states {str(stated)[:20]!r} attention heads: it is damaged; use an intact copy")
    return int(str(stated))


def _stored(path: Path) -> tuple[dict[str, StoredTensor], bool]:
    """Returns the tensors in a file of torch.save, torch.jit.save or NVIDIA's, and whether it is TorchScript.

    Raises: Unreadable: it is damaged, or holds something else.  OSError: it cannot be read.
    """
    if zipfile.is_zipfile(path):
        archive = Archive(path)
        if is_script(archive):
            return script_tensors(archive), True
        return _state_dict(archive.load("data.pkl", "data", {}), len(archive.data)), False
    data = mapped(path)
    if LEGACY_MAGIC.to_bytes(10, "little") in bytes(data[:16]):
        return _state_dict(load_legacy(data, {}), len(data)), False
    return _module_tensors(data), False


def _state_dict(value: object, size: int) -> dict[str, StoredTensor]:
    """Returns the tensors of a state dict.  Raises: Unreadable: the value is none, or larger than its file."""
    if not isinstance(value, dict) or not value:
        raise Unreadable("holds no plain dict of tensors: give a file of weights (a state dict)")
    wrong = next((name for name, tensor in value.items() if not isinstance(tensor, StoredTensor)), None)
    if wrong is not None:
        raise Unreadable(f"holds no tensor as {str(wrong)[:60]!r}: give a file of weights (a state dict)")
    if sum(tensor.nbytes for tensor in value.values()) > 2 * size:
        raise Unreadable(f"holds the same numbers many times: {FORGED}")
    return {str(name): tensor for name, tensor in value.items()}


LAYERS = {
    "container": ("Sequential",),
    "linear": ("Linear",),
    "pooling": ("AvgPool2d", "MaxPool2d"),
}
"""torch's own layers in NVIDIA's pickle of Inception, by the module of torch.nn."""
CLASSES = {
    *("InceptionV3", "Conv2dLayer", "InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE"),
    *(name for names in LAYERS.values() for name in names),
}


def _module_tensors(data: memoryview) -> dict[str, StoredTensor]:
    """Returns the tensors of a module that NVIDIA's torch_utils.persistence pickled, by their names in its state dict.

    Raises: Unreadable: it is damaged, or holds something else.
    """
    budget = Budget(len(data))
    layers = {
        (f"torch.nn.modules.{module}", name): StandIn(partial(PersistentObject, name))
        for module, names in LAYERS.items()
        for name in names
    }
    storages = {("torch.storage", "_load_from_bytes"): StandIn(partial(read_storage, budget=budget))}
    root = Unpickler(data, STAND_INS | storages | layers, budget=budget).run()
    if not isinstance(root, PersistentObject):
        raise Unreadable(f"holds {type_name(root)}, not a network: give a file of weights (a state dict)")
    return {name: tensor for name, tensor, _ in state_dict(root, set(), budget, known=CLASSES)}
