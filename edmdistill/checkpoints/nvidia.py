"""Reads the network pickles of NVIDIA's EDM and EDM2 without executing them.

Such a file is a pickled dict with the network under `ema`. Each of its objects carries the source text of its class,
which the official loader executes; here the text is ignored, and the class name, the constructor's arguments and the
tensors are taken from the object's recorded state.
Source: torch_utils/persistence.py, training/networks.py and training/networks_edm2.py of the official repositories.
"""

from __future__ import annotations

import hashlib
import mmap
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
from edmdistill.checkpoints.unsupported import (
    TEACHER,
    describe_entries,
    describe_safetensors,
    describe_tensors,
    refuse_by_name,
)
from edmdistill.errors import CheckpointError
from edmdistill.pickles import Budget, StandIn, Stateful, Unpickler, Unreadable, empty_dict
from edmdistill.stored_tensors import (
    LEGACY_MAGIC,
    Array,
    Dtype,
    StoredTensor,
    read_scalar,
    read_storage,
    rebuild_tensor,
)

if TYPE_CHECKING:
    from torch import Tensor

# The constructors' parameters in order, as arguments may be positional.
_EDM = ("img_resolution", "img_channels", "label_dim", "use_fp16")
_PRECONDITIONINGS = {
    "VPPrecond": (*_EDM, "beta_d", "beta_min", "M", "epsilon_t", "model_type"),
    "VEPrecond": (*_EDM, "sigma_min", "sigma_max", "model_type"),
    "iDDPMPrecond": (*_EDM, "C_1", "C_2", "M", "model_type"),
    "EDMPrecond": (*_EDM, "sigma_min", "sigma_max", "sigma_data", "model_type"),
    "Precond": (*_EDM, "sigma_data", "logvar_channels"),
}
_ADM = (
    *("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels", "channel_mult"),
    *("channel_mult_emb", "num_blocks", "attn_resolutions", "dropout", "label_dropout"),
)
_NETWORKS = {
    "SongUNet": (*_ADM, "embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter"),
    "DhariwalUNet": _ADM,
    "UNet": (
        *("img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult", "channel_mult_noise"),
        *("channel_mult_emb", "num_blocks", "attn_resolutions", "label_balance", "concat_balance"),
    ),
}
_VAE = {  # StabilityVAEEncoder's parameters in order, with their defaults
    "vae_name": "stabilityai/sd-vae-ft-mse",
    "raw_mean": [5.81, 3.25, 0.12, -2.15],
    "raw_std": [4.17, 4.62, 3.71, 3.28],
    "final_mean": 0,
    "final_std": 0.5,
    "batch_size": 8,
}
_PARAMETERS = _PRECONDITIONINGS | _NETWORKS | {"StabilityVAEEncoder": tuple(_VAE)}
_MODULES = {
    *(*_PRECONDITIONINGS, *_NETWORKS, "ModuleDict", "Linear", "Conv2d", "GroupNorm", "UNetBlock"),
    *("PositionalEmbedding", "FourierEmbedding", "MPFourier", "MPConv", "Block"),
}
_FLOATS = ("float16", "bfloat16", "float32", "float64")

_DAMAGED = "it is damaged or was not written by NVIDIA's code"
_WANTED = "give a network pickle of EDM or EDM2, not a training state or a part of one"


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What an official pickle says, checked as a file.  Whether the tensors fit the network is not seen here.

    Attributes:
        sha256: of the file as it lies there.
        preconditioning_class, network_class: the official names, for instance EDMPrecond and SongUNet.
        arguments, network_arguments: what the constructors were called with, by name, defaults not filled in.
        attributes: the preconditioning's own numbers as stored: sigma_min, sigma_data, ...
        stored: the parameters and buffers by their official state-dict names, in that order.
        buffers: those of them that are buffers.
        encoder, loss, augment: class_name and arguments; for a VAE encoder also its statistics.
        dataset: the data set's arguments.
        notes: what is unusual, one phrase each.
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
        """The tensors themselves, dtype as stored."""
        return {name: stored.tensor() for name, stored in self.stored.items()}


def read_official(path: str | Path) -> OfficialCheckpoint:
    """Reads an official EDM or EDM2 network pickle (.pkl, or gzip of one).  Needs no torch until tensors are asked for.

    Raises: CheckpointError: the file cannot be read, is not such a pickle, or is damaged or forged.
    """
    path = Path(path)
    refuse_by_name(path)
    with downloaded(path):
        return _read(path)


def _read(path: Path) -> OfficialCheckpoint:
    try:
        data = _content(path)
        pickled = _unpacked(data, path)
        budget = Budget(len(pickled))
        entries = _entries(pickled, budget)
        checkpoint = _checkpoint(path, hashlib.sha256(data).hexdigest(), entries, budget)
        return replace(checkpoint, notes=tuple(_notes(checkpoint, entries)))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Unreadable as error:
        raise CheckpointError(f"{path} {error}.") from error


def _content(path: Path) -> memoryview:
    if path.exists() and not path.is_file():
        raise Unreadable("is not a file: give the .pkl file itself")
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise Unreadable("is empty: download it again")
        # Mapped, so that a file of several GB is in memory once, as tensors, and not twice.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _unpacked(data: memoryview, path: Path) -> memoryview:
    """The pickle in the file."""
    head = bytes(data[:64])
    if head.startswith(b"\x1f\x8b"):
        stream = zlib.decompressobj(wbits=31)
        try:
            # Weights hardly compress: what grows without measure is no checkpoint.
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


def _only_weights(found: str) -> Unreadable:
    return Unreadable(
        f"is {found}, which holds weights (a state dict) without the network's class and arguments: give the network "
        "pickle that the official code writes, for instance edm2-img512-s-2147483-0.025.pkl"
    )


class _Object(Stateful):
    """Stands for an object of an official class."""

    def __init__(self, class_name: str, state: object = None):
        self.class_name = class_name
        self.set_state(state or {})

    def set_state(self, state: object) -> None:
        if not isinstance(state, dict):
            raise TypeError
        self.state: dict[str, object] = state

    def members(self, kind: str, budget: Budget) -> dict[str, object]:
        """_parameters, _buffers or _modules, without those that are None."""
        members = self.state.get(kind)
        budget.step(len(members) if isinstance(members, dict) else 1)
        if not isinstance(members, dict) or not all(re.fullmatch(r"\w+", name, re.ASCII) for name in members):
            raise Unreadable(f"has no proper {kind} in its {self.class_name[:60]!r}: {_DAMAGED}")
        return {name: member for name, member in members.items() if member is not None}


def _persistent(meta: object) -> _Object:
    """Stands for torch_utils.persistence._reconstruct_persistent_obj."""
    match meta:
        case {"type": "class", "version": 6, "class_name": str() as name, "state": dict() | None as state}:
            return _Object(name, state)
        case {"type": str() as kind, "version": int() as version}:
            raise Unreadable(
                f"holds an object of type {kind[:40]!r} in persistence version {version}, where all official files "
                "have type 'class' and version 6: get the file from NVIDIA"
            )
    raise TypeError


_DICT, _ARRAY, _SCALAR = StandIn(empty_dict), StandIn(lambda *_: Array()), StandIn(read_scalar)
_NAMES: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _DICT,
    ("dnnlib.util", "EasyDict"): _DICT,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): StandIn(_persistent),
    ("torch.nn.modules.container", "ModuleDict"): StandIn(lambda: _Object("ModuleDict")),
    ("torch._utils", "_rebuild_parameter"): StandIn(lambda tensor, *_: tensor),
    ("torch._utils", "_rebuild_tensor_v2"): StandIn(rebuild_tensor),
    ("numpy.core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
    ("numpy", "dtype"): StandIn(Dtype),
}


def _entries(data: memoryview, budget: Budget) -> dict[str, object]:
    """The dict in the pickle, with something under `ema`."""
    storages = {("torch.storage", "_load_from_bytes"): StandIn(partial(read_storage, budget=budget))}
    root = Unpickler(data, _NAMES | storages, budget=budget).run()
    if type(root) is int and root == LEGACY_MAGIC:
        raise _only_weights("a file of torch.save")
    if not isinstance(root, dict):
        raise Unreadable(f"holds {_kind(root)} where a dict with a network under 'ema' is expected: {_WANTED}")
    if root and all(isinstance(value, StoredTensor) for value in root.values()):
        raise Unreadable(other) if (other := describe_tensors(root)) else _only_weights("a pickled dict of tensors")
    if "ema" not in root:
        if other := describe_entries(root):
            raise Unreadable(other)
        if one := next((name for name in root if re.fullmatch(r"(?i)g|g_ema|generator.*", name)), None):
            raise Unreadable(f"holds a generator under {one[:60]!r} and no teacher: {TEACHER}")
        raise Unreadable(f"holds no network under 'ema' but {_names(root) or 'nothing'}: {_WANTED}")
    return root


def _kind(value: object) -> str:
    return repr(value.class_name[:60]) if isinstance(value, _Object) else f"a value of type {type(value).__name__}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name[:60]) for name in islice(names, 8))


def _checkpoint(path: Path, digest: str, entries: dict[str, object], budget: Budget) -> OfficialCheckpoint:
    ema = entries["ema"]
    if isinstance(ema, _Object) and "generator" in ema.class_name.lower():
        raise Unreadable(f"holds {_kind(ema)} under 'ema', a one-step generator and not a teacher: {TEACHER}")
    if not isinstance(ema, _Object) or ema.class_name not in _PRECONDITIONINGS:
        raise Unreadable(f"holds {_kind(ema)} under 'ema', not a network ({_names(_PRECONDITIONINGS)}): {_WANTED}")
    inner = ema.members("_modules", budget).get("unet" if ema.class_name == "Precond" else "model")
    if not isinstance(inner, _Object) or inner.class_name not in _NETWORKS:
        raise Unreadable(
            f"holds {_kind(inner)} in its {ema.class_name}, not a network ({_names(_NETWORKS)}): {_WANTED}"
        )
    tensors = list(_tensors(ema, set(), budget))
    dataset = _plain(entries.get("dataset_kwargs"))
    return OfficialCheckpoint(
        path=path,
        sha256=digest,
        preconditioning_class=ema.class_name,
        network_class=inner.class_name,
        arguments=_arguments(ema),
        network_arguments=_arguments(inner),
        attributes=_attributes(ema),
        stored={name: tensor for name, tensor, _ in tensors},
        buffers=frozenset(name for name, _, is_buffer in tensors if is_buffer),
        encoder=_encoder(entries.get("encoder")),
        loss=_description(entries.get("loss_fn")),
        augment=_description(entries.get("augment_pipe")),
        dataset=dataset if isinstance(dataset, dict) else None,
    )


def _tensors(
    module: _Object, seen: set[int], budget: Budget, prefix: str = ""
) -> Iterator[tuple[str, StoredTensor, bool]]:
    """The state dict in the official order: name, tensor, whether it is a buffer."""
    if module.class_name not in _MODULES:
        raise Unreadable(f"holds {_kind(module)} as {prefix[:-1]}, a layer that no official network has: {_DAMAGED}")
    if id(module) in seen or prefix.count(".") > 8:
        raise Unreadable(f"nests its layers as no official network does: {_DAMAGED}")
    seen.add(id(module))
    transient = module.state.get("_non_persistent_buffers_set")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in module.members(kind, budget).items():
            if kind == "_buffers" and isinstance(transient, set) and name in transient:
                continue
            if not isinstance(tensor, StoredTensor) or tensor.dtype not in _FLOATS:
                found = tensor.dtype if isinstance(tensor, StoredTensor) else _kind(tensor)
                raise Unreadable(f"holds {found} as {prefix}{name}, not floating-point numbers: {_DAMAGED}")
            budget.take(tensor.nbytes)
            yield prefix + name, tensor, kind == "_buffers"
    for name, child in module.members("_modules", budget).items():
        if not isinstance(child, _Object):
            raise Unreadable(f"holds {_kind(child)} as {prefix}{name}, not a layer: {_DAMAGED}")
        yield from _tensors(child, seen, budget, f"{prefix}{name}.")


def _arguments(item: _Object) -> dict[str, object]:
    """What the object's constructor was called with, by name."""
    positional, named = _plain(item.state.get("_init_args")), _plain(item.state.get("_init_kwargs"))
    names = _PARAMETERS.get(item.class_name, ())
    if not isinstance(positional, list) or not isinstance(named, dict) or len(positional) > len(names):
        raise Unreadable(f"does not record how its {_kind(item)} was made: {_DAMAGED}")
    return dict(zip(names, positional, strict=False)) | named


def _attributes(item: _Object) -> dict[str, object]:
    """The object's own numbers and words."""
    return {
        name: value
        for name, value in item.state.items()
        if not name.startswith("_") and name != "training" and isinstance(value, str | int | float | None)
    }


def _description(item: object) -> dict[str, object] | None:
    return {"class_name": item.class_name, "arguments": _arguments(item)} if isinstance(item, _Object) else None


def _encoder(item: object) -> dict[str, object] | None:
    description = _description(item)
    if description and isinstance(item, _Object) and item.class_name == "StabilityVAEEncoder":
        # Scale and bias are what is used; mean and std say the same as people know it.
        description |= _VAE | _arguments(item) | {name: _plain(item.state.get(name)) for name in ("scale", "bias")}
    return description


def _plain(value: object, budget: Iterator[int] | None = None, depth: int = 0) -> object:
    """Numbers and words, and lists and dicts of them, as JSON has them."""
    # A pickle can share one list among many and so spell out more than memory holds.
    budget = budget or iter(range(10_000))
    if next(budget, None) is None or depth > 8:
        raise Unreadable(f"holds arguments larger than any network's: {_DAMAGED}")
    match value:
        case None | str() | int() | float():
            return value
        case list() | tuple():
            return [_plain(item, budget, depth + 1) for item in value]
        case dict():
            return {key: _plain(item, budget, depth + 1) for key, item in value.items()}
        case Array() if value.numbers.size < 100:
            return value.numbers.tolist()
    raise Unreadable(f"holds {_kind(value)} among its arguments: {_DAMAGED}")


def _notes(checkpoint: OfficialCheckpoint, entries: Mapping[str, object]) -> Iterator[str]:
    """What is unusual."""
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
