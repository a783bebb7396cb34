"""Objects of the official code's torch_utils.persistence, as a pickle holds them.

Each carries the source text of its class, which the official loader executes; here the text is ignored, and the class
name, the constructor's arguments and the tensors are taken from the object's recorded state.
Source: torch_utils/persistence.py, training/networks.py and training/networks_edm2.py of the official repositories.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any

from edmdistill.errors import INTACT
from edmdistill.pickles import Budget, StandIn, Stateful, Unreadable, empty_dict
from edmdistill.stored_tensors import NUMPY, Array, StoredTensor, rebuild_tensor

# The constructors' parameters in order, as arguments may be positional.
_EDM = ("img_resolution", "img_channels", "label_dim", "use_fp16")
PRECONDITIONING_PARAMETERS = {
    "VPPrecond": (*_EDM, "beta_d", "beta_min", "M", "epsilon_t", "model_type"),
    "VEPrecond": (*_EDM, "sigma_min", "sigma_max", "model_type"),
    "iDDPMPrecond": (*_EDM, "C_1", "C_2", "M", "model_type"),
    "EDMPrecond": (*_EDM, "sigma_min", "sigma_max", "sigma_data", "model_type"),
    "ECMPrecond": (*_EDM, "sigma_min", "sigma_max", "sigma_data", "model_type"),
    "Precond": (*_EDM, "sigma_data", "logvar_channels"),
}
_ADM = (
    *("img_resolution", "in_channels", "out_channels", "label_dim", "augment_dim", "model_channels", "channel_mult"),
    *("channel_mult_emb", "num_blocks", "attn_resolutions", "dropout", "label_dropout"),
)
NETWORK_PARAMETERS = {
    "SongUNet": (*_ADM, "embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter"),
    "DhariwalUNet": _ADM,
    "UNet": (
        *("img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult", "channel_mult_noise"),
        *("channel_mult_emb", "num_blocks", "attn_resolutions", "label_balance", "concat_balance"),
    ),
}
VAE_PARAMETERS: dict[str, Any] = {  # StabilityVAEEncoder's parameters in order, with their defaults
    "vae_name": "stabilityai/sd-vae-ft-mse",
    "raw_mean": [5.81, 3.25, 0.12, -2.15],
    "raw_std": [4.17, 4.62, 3.71, 3.28],
    "final_mean": 0,
    "final_std": 0.5,
    "batch_size": 8,
}
SIDA = {
    "EDMPrecond_EncoderDecoder": "EDMPrecond",
    "SongUNet_EncoderDecoder": "SongUNet",
    "DhariwalUNet_EncoderDecoder": "DhariwalUNet",
    "EDM_2_Precond_Generator": "Precond",
    "EDM_2_Precond_EncoderDecoder": "Precond",
    "UNet_EncoderDecoder": "UNet",
}
"""NVIDIA's classes by those of SiDA's generators, which compute the same, and a discriminator's logits if asked.
Source: mingyuanzhou/SiD, branch sida."""
GENERATOR_ARGUMENTS = {"force_normalization", "use_gan", "dropout_res"}
"""Arguments of training that SiDA's classes and those of ECT, branch imgnet, have beside NVIDIA's."""
CONSTRUCTOR_PARAMETERS = (
    PRECONDITIONING_PARAMETERS | NETWORK_PARAMETERS | {"StabilityVAEEncoder": tuple(VAE_PARAMETERS)}
)
_MODULES = {
    *(*PRECONDITIONING_PARAMETERS, *NETWORK_PARAMETERS, "ModuleDict", "Linear", "Conv2d", "GroupNorm", "UNetBlock"),
    *("PositionalEmbedding", "FourierEmbedding", "MPFourier", "MPConv", "Block"),
}
_FLOATS = ("float16", "bfloat16", "float32", "float64")

DAMAGED = f"it is damaged or was not written by NVIDIA's code; {INTACT}"


class PersistentObject(Stateful):
    """Stand-in for an object of an official class."""

    def __init__(self, class_name: str, state: object = None):
        self.class_name = class_name
        # The very dict: of an object that refers to itself it is filled later.
        self.set_state({} if state is None else state)

    def set_state(self, state: object) -> None:
        if not isinstance(state, dict):
            raise TypeError
        self.state: dict[str, object] = state

    def members(self, kind: str, budget: Budget) -> dict[str, object]:
        """Returns _parameters, _buffers or _modules, without those that are None."""
        members = self.state.get(kind)
        budget.step(len(members) if isinstance(members, dict) else 1)
        if not isinstance(members, dict) or not all(re.fullmatch(r"\w+", str(name), re.ASCII) for name in members):
            raise Unreadable(f"has no proper {kind} in its {self.class_name[:60]!r}: {DAMAGED}")
        return {str(name): member for name, member in members.items() if member is not None}


def _persistent(meta: object) -> PersistentObject:
    """Stand-in for torch_utils.persistence._reconstruct_persistent_obj."""
    match meta:
        case {"type": "class", "version": 6, "class_name": str() as name, "state": dict() | None as state}:
            return PersistentObject(name, state)
        case {"type": str() as kind, "version": int() as version}:
            raise Unreadable(
                f"holds an object of type {kind[:40]!r} in persistence version {version}, where all official files "
                "have type 'class' and version 6: get the file from NVIDIA"
            )
    raise TypeError


def _set(items: object) -> set[str]:
    """Stand-in for set, by which protocol 3 writes one: the default of Python 3.7."""
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise TypeError
    return set(items)


def _method(owner: object, name: object) -> None:
    """Stand-in for getattr, by which a pickle holds a method: ECT's loss has one among its attributes."""
    if not isinstance(owner, PersistentObject) or not isinstance(name, str):
        raise TypeError


_DICT = StandIn(empty_dict)
STAND_INS: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _DICT,
    ("dnnlib.util", "EasyDict"): _DICT,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): StandIn(_persistent),
    ("builtins", "getattr"): StandIn(_method),
    ("builtins", "set"): StandIn(_set),
    ("torch.nn.modules.container", "ModuleDict"): StandIn(lambda: PersistentObject("ModuleDict")),
    ("torch._utils", "_rebuild_parameter"): StandIn(lambda tensor, *_: tensor),
    ("torch._utils", "_rebuild_tensor_v2"): StandIn(rebuild_tensor),
    **NUMPY,
}


def type_name(value: object) -> str:
    """Returns the class of an official object, or the type of another value, as an error names it."""
    return (
        repr(value.class_name[:60])
        if isinstance(value, PersistentObject)
        else f"a value of type {type(value).__name__}"
    )


def state_dict(
    module: PersistentObject,
    seen: set[int],
    budget: Budget,
    prefix: str = "",
    known: Container[str] = frozenset(_MODULES),
) -> Iterator[tuple[str, StoredTensor, bool]]:
    """Yields a module's state dict in the official order: name, tensor, whether it is a buffer.

    Args:
        known: the names of the classes that a layer may have.
    """
    if module.class_name not in known:
        raise Unreadable(f"holds {type_name(module)} as {prefix[:-1]}, a layer that no official network has: {DAMAGED}")
    if id(module) in seen or prefix.count(".") > 8:
        raise Unreadable(f"nests its layers as no official network does: {DAMAGED}")
    seen.add(id(module))
    transient = module.state.get("_non_persistent_buffers_set")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in module.members(kind, budget).items():
            if kind == "_buffers" and isinstance(transient, set) and name in transient:
                continue
            if not isinstance(tensor, StoredTensor) or tensor.dtype not in _FLOATS:
                dtype = tensor.dtype if isinstance(tensor, StoredTensor) else type_name(tensor)
                raise Unreadable(f"holds {dtype} as {prefix}{name}, not floating-point numbers: {DAMAGED}")
            budget.take(tensor.nbytes)
            yield prefix + name, tensor, kind == "_buffers"
    for name, child in module.members("_modules", budget).items():
        if not isinstance(child, PersistentObject):
            raise Unreadable(f"holds {type_name(child)} as {prefix}{name}, not a layer: {DAMAGED}")
        yield from state_dict(child, seen, budget, f"{prefix}{name}.", known)


def constructor_arguments(item: PersistentObject) -> dict[str, object]:
    """Returns what the object's constructor was called with, by name."""
    positional, named = to_plain(item.state.get("_init_args")), to_plain(item.state.get("_init_kwargs"))
    names = CONSTRUCTOR_PARAMETERS.get(item.class_name, ())
    if not isinstance(positional, list) or not isinstance(named, dict) or len(positional) > len(names):
        raise Unreadable(f"does not record how its {type_name(item)} was made: {DAMAGED}")
    return dict(zip(names, positional, strict=False)) | named


def attributes(item: PersistentObject) -> dict[str, object]:
    """Returns the object's own numbers and strings, by name."""
    return {
        name: value
        for name, value in item.state.items()
        if isinstance(name, str)
        and not name.startswith("_")
        and name != "training"
        and isinstance(value, str | int | float | None)
    }


def to_plain(value: object, budget: Iterator[int] | None = None, depth: int = 0) -> object:
    """Returns numbers and strings, and lists and dicts of them, as JSON has them."""
    # A pickle can share one list many times, and so expand to more than fits in memory.
    budget = budget or iter(range(10_000))
    if next(budget, None) is None or depth > 8:
        raise Unreadable(f"holds arguments larger than any network's: {DAMAGED}")
    match value:
        case None | str() | int() | float():
            return value
        case list() | tuple():
            return [to_plain(item, budget, depth + 1) for item in value]
        case dict():
            return {str(key): to_plain(item, budget, depth + 1) for key, item in value.items()}
        case Array() if value.numbers.size < 100:
            return value.numbers.tolist()
    raise Unreadable(f"holds {type_name(value)} among its arguments: {DAMAGED}")
