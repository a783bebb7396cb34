"""Writes a trained EDM2-style checkpoint in the layout of NVIDIA's network pickles: how embedded teachers were made.

    edmdistill train diffusion --recipe diffusion/digits --data digits --run-dir runs/teacher
    python scripts/make_teacher.py runs/teacher/generator edmdistill/assets/digits-teacher.pkl

The file has the official containers, class names, parameter names and float16 tensors, and no source code: every
`module_src` is a comment. So it goes the way that an official EDM2 pickle goes through `edmdistill convert`, and only
that way: NVIDIA's own loader asks for the source.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import nn

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.official import OUR_ARGUMENTS
from edmdistill.checkpoints.store import load_checkpoint
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.surgery.two_time import drop_second_time


class EasyDict(dict[str, Any]):
    """Stands for dnnlib.util.EasyDict."""


class Persistent:
    """An object of an official persistent class, by name and state."""

    def __init__(self, name: str, state: dict[str, Any], kwargs: dict[str, Any]) -> None:
        self.name = name
        self.state = {**state, "_init_args": (), "_init_kwargs": kwargs}


class Global:
    """A function that the file names and this process does not have."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None: ...


RECONSTRUCT = Global("torch_utils.persistence", "_reconstruct_persistent_obj")
EASY_DICT = Global("dnnlib.util", "EasyDict")


PurePickler: Any = vars(pickle)["_Pickler"]


class OfficialPickler(PurePickler):  # type: ignore[misc]  # it has no stubs
    """Pickles the stand-ins under the official names; Python's own pickler names only what it can import."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Global):
            return obj.name
        if obj is EasyDict:
            return EASY_DICT.name
        if isinstance(obj, Persistent):
            meta = {"type": "class", "version": 6, "module_src": "# source removed", "class_name": obj.name}
            return RECONSTRUCT, ({**meta, "state": obj.state},)
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        target = EASY_DICT if obj is EasyDict else obj
        if isinstance(target, Global):
            self.save(target.module)
            self.save(target.name)
            self.write(pickle.STACK_GLOBAL)
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def module_state(module: nn.Module, children: dict[str, Any]) -> dict[str, Any]:
    """The part of an official module's __dict__ that holds tensors, as float16, as the official snapshots do."""
    parameters = {
        name: nn.Parameter(p.detach().half(), False) for name, p in module._parameters.items() if p is not None
    }
    buffers = {name: b.half() for name, b in module._buffers.items() if b is not None}
    return {
        "training": False,
        "_parameters": OrderedDict(parameters),
        "_buffers": OrderedDict(buffers),
        "_modules": OrderedDict(children),
    }


def official(module: nn.Module | None, kwargs: dict[str, Any], skip: tuple[str, ...] = ()) -> Any:
    """A module of ours, and all below it, as official objects: the classes have the same names."""
    if module is None:
        return None
    children = {name: official(child, {}) for name, child in module._modules.items() if name not in skip}
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain.__dict__["_modules"] = children
        plain.__dict__["training"] = False
        return plain
    return Persistent(type(module).__name__, module_state(module, children), kwargs)


def to_pickle(network: UNet, config: CheckpointConfig, data_set: str = "digits") -> bytes:
    """The network as the bytes of an official EDM2 pickle: EasyDict(encoder, dataset_kwargs, loss_fn, ema)."""
    arguments = {k: v for k, v in network.arguments.items() if k not in {*OUR_ARGUMENTS["edm2"], "logvar_channels"}}
    head = ("logvar_fourier", "logvar_linear")
    unet = official(network, arguments, skip=(*head, "second_time"))
    parts = {"unet": unet, **{name: official(network.get_submodule(name), {}) for name in head}}
    precond = {**arguments, "logvar_channels": network.arguments["logvar_channels"], "sigma_data": config.sigma_data}
    empty = nn.Module()
    ema = Persistent(
        "Precond",
        {**module_state(empty, parts), "label_dim": network.label_dim, "sigma_data": config.sigma_data},
        {**precond, "use_fp16": True},
    )
    data = EasyDict(class_name="training.dataset.ImageFolderDataset", path=data_set, use_labels=True)
    top = EasyDict(encoder=Persistent("StandardRGBEncoder", {}, {}), dataset_kwargs=data, ema=ema)
    buffer = io.BytesIO()
    OfficialPickler(buffer, protocol=4).dump(top)
    return buffer.getvalue()


def main() -> None:
    source, out = sys.argv[1:]
    flow, config = load_checkpoint(source)
    network = drop_second_time(flow).network
    assert isinstance(network, UNet), "only EDM2 networks have this layout"
    Path(out).write_bytes(to_pickle(network, config, Path(out).stem.removesuffix("-teacher")))


if __name__ == "__main__":
    main()
