"""Reads the network pickles of NVIDIA's EDM and EDM2 without executing them.

Such a file is a pickled dict with the network under `ema`.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from edmdistill.checkpoints.download import downloaded
from edmdistill.checkpoints.persistence import (
    GENERATOR_ARGUMENTS,
    NETWORK_PARAMETERS,
    PRECONDITIONING_PARAMETERS,
    SIDA,
    STAND_INS,
    VAE_PARAMETERS,
    PersistentObject,
    attributes,
    constructor_arguments,
    state_dict,
    to_plain,
    type_name,
)
from edmdistill.checkpoints.unsupported import (
    TEACHER,
    describe_entries,
    describe_safetensors,
    describe_tensors,
    refuse_by_name,
)
from edmdistill.errors import CheckpointError
from edmdistill.pickles import Budget, StandIn, Unpickler, Unreadable
from edmdistill.stored_tensors import LEGACY_MAGIC, StoredTensor, mapped, read_storage, release

if TYPE_CHECKING:
    from torch import Tensor

_WANTED = "give a network pickle of EDM or EDM2, not a training state or a part of one"


@dataclass(frozen=True)
class OfficialCheckpoint:
    """The content of an official pickle, checked as a file.  Whether the tensors fit the network is not checked here.

    Attributes:
        sha256: of the file.
        preconditioning_class, network_class: the official names, for instance EDMPrecond and SongUNet.
        arguments, network_arguments: what the constructors were called with, by name, defaults not filled in.
        attributes: the preconditioning's attributes as stored: sigma_min, sigma_data, ...
        stored: the parameters and buffers by their official state-dict names, in that order.
        buffers: the names of the buffers among them.
        encoder, loss, augment: class_name and arguments; for a VAE encoder also its statistics.
        dataset: the data set's arguments.
        notes: phrases on what is unusual.
    """

    path: Path
    sha256: str
    preconditioning_class: str
    network_class: str
    arguments: dict[str, object]
    network_arguments: dict[str, object]
    attributes: dict[str, object]
    stored: dict[str, StoredTensor]
    buffers: frozenset[str]
    encoder: dict[str, object] | None
    loss: dict[str, object] | None
    augment: dict[str, object] | None
    dataset: dict[str, object] | None
    notes: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors, in the dtypes in which they are stored."""
        return {name: stored.tensor() for name, stored in self.stored.items()}


def read_official(path: str | Path, *, generator: bool = False) -> OfficialCheckpoint:
    """Reads an official EDM or EDM2 network pickle (.pkl, or gzip of one).  Needs no torch until tensors are asked for.

    Args:
        generator: a one-step generator is wanted, so a name that says so is no reason to refuse it.
    Raises: CheckpointError: the file cannot be read, is not such a pickle, or is damaged or forged.
    """
    path = Path(path)
    if not generator:
        refuse_by_name(path)
    with downloaded(path):
        return _read(path, generator)


def _read(path: Path, generator: bool) -> OfficialCheckpoint:
    try:
        data = mapped(path)
        pickled = _unpacked(data, path)
        budget = Budget(len(pickled))
        entries = _entries(pickled, budget)
        if generator:
            _as_nvidias(entries["ema"], budget)
        checkpoint = _checkpoint(path, hashlib.sha256(data).hexdigest(), entries, budget)
        release(data)
        return replace(checkpoint, notes=tuple(_notes(checkpoint, entries)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Unreadable as error:
        raise CheckpointError(f"{path} {error}") from error


def _unpacked(data: memoryview, path: Path) -> memoryview:
    """Returns the pickle in the file, decompressed.  Raises: Unreadable: the file is of another kind."""
    head = bytes(data[:64])
    if head.startswith(b"\x1f\x8b"):
        stream = zlib.decompressobj(wbits=31)
        try:
            # Weights hardly compress: what grows more is no checkpoint.
            unpacked = stream.decompress(data, max(2**26, 8 * len(data)))
        except zlib.error as error:
            raise Unreadable("is a damaged gzip file: download it again") from error
        if not stream.eof:
            raise Unreadable("is a gzip file that is cut short or grows beyond measure: download it again")
        return memoryview(unpacked)
    if head.lstrip().startswith(b"<"):
        raise Unreadable("is a web page, not a checkpoint: the download failed, see what the address shows")
    if head.startswith(b"version https://git-lfs"):
        raise Unreadable("is a Git LFS pointer, not the checkpoint itself: run `git lfs pull`")
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise Unreadable("is a zip archive that is cut short or damaged: download it again")
        raise _only_weights("a zip archive of torch.save")
    if head[8:10] == b'{"':
        beside = path.with_name("config.json")
        if path.name == "model.safetensors" and beside.is_file():
            raise Unreadable(f"is a part of a checkpoint: give its folder, {path.parent}")
        header = bytes(data[8 : 8 + min(int.from_bytes(data[:8], "little"), 2**24)])
        raise Unreadable(other) if (other := describe_safetensors(header)) else _only_weights("a safetensors file")
    return data


def _only_weights(kind: str) -> Unreadable:
    return Unreadable(
        f"is {kind}, which holds weights (a state dict) without the network's class and arguments: give the network "
        "pickle that the official code writes, such as network-snapshot-010000.pkl"
    )


def _entries(data: memoryview, budget: Budget) -> dict[str, object]:
    """Returns the dict in the pickle, with something under `ema`."""
    storages = {("torch.storage", "_load_from_bytes"): StandIn(partial(read_storage, budget=budget))}
    root = Unpickler(data, STAND_INS | storages, budget=budget, keys=(str, int)).run()  # hooks have numbers
    if type(root) is int and root == LEGACY_MAGIC:
        raise _only_weights("a file of torch.save")
    if not isinstance(root, dict) or not all(isinstance(name, str) for name in root):
        raise Unreadable(f"holds {type_name(root)} where a dict with a network under 'ema' is expected: {_WANTED}")
    if root and all(isinstance(value, StoredTensor) for value in root.values()):
        raise Unreadable(other) if (other := describe_tensors(root)) else _only_weights("a pickled dict of tensors")
    if "ema" not in root:
        if other := describe_entries(root):
            raise Unreadable(other)
        if one := next((name for name in root if re.fullmatch(r"(?i)g|g_ema|generator.*", name)), None):
            raise Unreadable(f"holds a generator under {one[:60]!r} and no teacher: {TEACHER}")
        raise Unreadable(f"holds no network under 'ema' but {_names(root) or 'nothing'}: {_WANTED}")
    return root


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name[:60]) for name in islice(names, 8))


def _as_nvidias(ema: object, budget: Budget) -> None:
    """Gives a published generator, and the network in it, the names and arguments of NVIDIA's classes."""
    if not isinstance(ema, PersistentObject) or ema.class_name not in {**SIDA, "Precond": ""}:
        return
    layers = ema.members("_modules", budget)
    for item in (ema, *layers.values()):
        if isinstance(item, PersistentObject) and isinstance(arguments := item.state.get("_init_kwargs"), dict):
            item.class_name = SIDA.get(item.class_name, item.class_name)
            item.state["_init_kwargs"] = {
                name: value for name, value in arguments.items() if name not in GENERATOR_ARGUMENTS
            }
    if ema.class_name == "Precond" and "logvar_linear" not in layers:
        ema.state["_init_kwargs"] = {**ema.members("_init_kwargs", budget), "logvar_channels": 0}


def _checkpoint(path: Path, digest: str, entries: dict[str, object], budget: Budget) -> OfficialCheckpoint:
    ema = entries["ema"]
    if isinstance(ema, PersistentObject) and ("generator" in ema.class_name.lower() or ema.class_name in SIDA):
        raise Unreadable(f"holds {type_name(ema)} under 'ema', a one-step generator and not a teacher: {TEACHER}")
    if not isinstance(ema, PersistentObject) or ema.class_name not in PRECONDITIONING_PARAMETERS:
        raise Unreadable(
            f"holds {type_name(ema)} under 'ema', not a network ({_names(PRECONDITIONING_PARAMETERS)}): {_WANTED}"
        )
    inner = ema.members("_modules", budget).get("unet" if ema.class_name == "Precond" else "model")
    if not isinstance(inner, PersistentObject) or inner.class_name not in NETWORK_PARAMETERS:
        raise Unreadable(
            f"holds {type_name(inner)} in its {ema.class_name}, not a network ({_names(NETWORK_PARAMETERS)}): {_WANTED}"
        )
    tensors = list(state_dict(ema, set(), budget))
    dataset = to_plain(entries.get("dataset_kwargs"))
    return OfficialCheckpoint(
        path=path,
        sha256=digest,
        preconditioning_class=ema.class_name,
        network_class=inner.class_name,
        arguments=constructor_arguments(ema),
        network_arguments=constructor_arguments(inner),
        attributes=attributes(ema),
        stored={name: tensor for name, tensor, _ in tensors},
        buffers=frozenset(name for name, _, is_buffer in tensors if is_buffer),
        encoder=_encoder(entries.get("encoder")),
        loss=_description(entries.get("loss_fn")),
        augment=_description(entries.get("augment_pipe")),
        dataset=dataset if isinstance(dataset, dict) else None,
    )


def _description(item: object) -> dict[str, object] | None:
    return (
        {"class_name": item.class_name, "arguments": constructor_arguments(item)}
        if isinstance(item, PersistentObject)
        else None
    )


def _encoder(item: object) -> dict[str, object] | None:
    description = _description(item)
    if description and isinstance(item, PersistentObject) and item.class_name == "StabilityVAEEncoder":
        # Scale and bias are what is used; mean and std say the same in the usual terms.
        description |= (
            VAE_PARAMETERS
            | constructor_arguments(item)
            | {name: to_plain(item.state.get(name)) for name in ("scale", "bias")}
        )
    return description


def _notes(checkpoint: OfficialCheckpoint, entries: Mapping[str, object]) -> Iterator[str]:
    """Yields phrases on what is unusual."""
    if extra := entries.keys() - {"ema", "loss_fn", "augment_pipe", "dataset_kwargs", "encoder"}:
        yield f"entries that official files do not have: {_names(sorted(extra))}"
    if len(entries) == 1:
        yield "only the network: no record of loss, data set or encoder"
    usual = "float16" if checkpoint.network_class == "UNet" else "float32"
    dtypes = {tensor.dtype for tensor in checkpoint.stored.values()}
    if dtypes != {usual}:
        yield f"stored as {', '.join(sorted(dtypes))} where official files have {usual}"
    for name, value in checkpoint.arguments.items():
        if name in checkpoint.attributes and (now := checkpoint.attributes[name]) != value:
            yield f"made with {name}={value!r}, changed to {now!r} afterwards"
    encoder = checkpoint.encoder
    if encoder and encoder["class_name"] not in ("StandardRGBEncoder", "StabilityVAEEncoder"):
        yield f"unknown encoder {encoder['class_name']!r}"
