"""Objects of the official code in a pickle: what they may hold, and what is refused."""

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from edmdistill.checkpoints.nvidia import read_official
from edmdistill.errors import CheckpointError


def reconstruct(meta: object) -> None:
    raise AssertionError("the reader must not come here")


reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Pickles what it is given as the official code does, with stand-ins for NVIDIA's modules."""
    for item in (reconstruct, EasyDict):
        package, module = item.__module__.split(".")[0], ModuleType(item.__module__)
        setattr(module, item.__qualname__, item)
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
        monkeypatch.setitem(sys.modules, item.__module__, module)

    def write(entries: object, protocol: int = 4) -> Path:
        path = tmp_path / "made.pkl"
        path.write_bytes(pickle.dumps(entries, protocol))
        return path

    return write


class Persistent:
    """Pickles as an object of the official class `name` would."""

    def __init__(self, name: str, state: object):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": "raise SystemExit",
            "class_name": name,
            "state": state,
        }

    def __reduce__(self) -> tuple[object, ...]:
        return reconstruct, (dict(self.meta),)  # a new one for each call, around the same state


def module(name: str, children: object = None, **state: object) -> Persistent:
    empty: dict[str, object] = {"_parameters": {}, "_buffers": {}, "_init_args": (), "_init_kwargs": {}}
    return Persistent(name, empty | {"_modules": children or {}, "training": False} | state)


def network(*layers: Persistent, **state: object) -> Persistent:
    inner = module("SongUNet", {f"layer{i}": layer for i, layer in enumerate(layers)})
    return module("EDMPrecond", {"model": inner}, **state)


def weights(*tensors: torch.Tensor) -> dict[str, nn.Parameter]:
    return {f"w{i}": nn.Parameter(tensor) for i, tensor in enumerate(tensors)}


def test_positional_arguments_get_names(write: Callable[[object], Path]) -> None:
    state = {"_init_args": (32, 3, 10), "_init_kwargs": {"model_type": "SongUNet"}}
    official = read_official(write({"ema": network(module("Linear", _parameters=weights(torch.ones(2))), **state)}))
    assert official.arguments == {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet"}
    with pytest.raises(CheckpointError, match="how its 'EDMPrecond' was made"):
        read_official(write({"ema": network(_init_args=tuple(range(20)))}))
    with pytest.raises(CheckpointError, match="how its 'EDMPrecond' was made"):
        read_official(write({"ema": network(_init_kwargs=None)}))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_what_modules_may_carry(write: Callable[..., Path], protocol: int) -> None:
    """Attributes of any kind, absent parameters, buffers that are not kept, views and ties: as torch's state_dict."""
    tied = torch.arange(6.0)
    layer = module(
        "Conv2d",
        {"act": None},
        _parameters={"bias": None, **weights(tied[2:].reshape(2, 2).t(), tied)},
        _buffers={"kept": torch.ones(1), "passing": torch.ones(1), "none": None},
        _non_persistent_buffers_set={"passing", "w1"},
        _forward_hooks=EasyDict(),
        _forward_pre_hooks={0: None},
        up=True,
        extra=[EasyDict(a=1), (1, 2.5, None), {"x"}],
    )
    old = module("GroupNorm", _buffers={"kept": torch.ones(1)})  # of a torch that knew no other buffers
    official = read_official(write(EasyDict(ema=network(layer, old)), protocol))
    expected = [f"model.layer{name}" for name in ("0.w0", "0.w1", "0.kept", "1.kept")]
    assert list(official.tensors) == expected
    assert official.buffers == set(expected[2:])
    assert torch.equal(official.tensors["model.layer0.w0"], tied[2:].reshape(2, 2).t())


def test_sidas_classes_are_nvidias_for_a_generator_alone(write: Callable[..., Path]) -> None:
    own = {"force_normalization": True, "use_gan": False, "sigma_data": 0.5}
    inner = module("UNet_EncoderDecoder", _init_kwargs={**own, "model_channels": 8})
    path = write({"ema": module("EDM_2_Precond_Generator", {"unet": inner}, _init_kwargs=own)})
    official = read_official(path, generator=True)
    assert (official.preconditioning_class, official.network_class) == ("Precond", "UNet")
    assert official.arguments == {"sigma_data": 0.5, "logvar_channels": 0}
    assert official.network_arguments == {"sigma_data": 0.5, "model_channels": 8}
    with pytest.raises(CheckpointError, match="a one-step generator and not a teacher"):
        read_official(path)
    inner = module("UNet", _init_kwargs={"dropout_res": 8})  # ECT's of ImageNet 64x64
    official = read_official(write({"ema": module("Precond", {"unet": inner})}), generator=True)
    assert (official.arguments, official.network_arguments) == ({"logvar_channels": 0}, {})


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({1: 2}, "holds a value of type dict"),
        ({}, "holds no network under 'ema' but nothing"),
        ({"ema": module("EDMPrecond", {1: 2})}, "NoneType"),
        ({"ema": network(_init_kwargs={1: 2})}, None),
        ({"ema": module("EDMPrecond", {1: 2}), 2: 3}, "holds a value of type dict"),
    ],
)
def test_numbers_as_names(write: Callable[..., Path], entries: object, why: str | None) -> None:
    if why is None:
        assert read_official(write(entries)).arguments == {"1": 2}
        return
    with pytest.raises(CheckpointError, match=why):
        read_official(write(entries))


class Loss(Persistent):
    """ECT's loss, one of whose attributes is a method of its own."""

    def __init__(self) -> None:
        super().__init__("ECMLoss", {"t_to_r": self.sigmoid, "q": 2, "_init_args": (), "_init_kwargs": {"q": 2}})

    def sigmoid(self) -> None: ...


def test_an_object_that_holds_its_own_method(write: Callable[[object], Path]) -> None:
    ema = network(module("Linear", _parameters=weights(torch.ones(2))))
    official = read_official(write({"ema": ema, "loss_fn": Loss()}))
    assert official.loss == {"class_name": "ECMLoss", "arguments": {"q": 2}}
    for call in ((getattr, 1, "real"), (getattr, ema, ema), (set, "ab"), (set, [1])):
        with pytest.raises(CheckpointError, match="damaged, or no official pickle"):
            read_official(write({"ema": ema, "loss_fn": Reduced(*call)}))


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return self.call[0], self.call[1:]


def test_notes(write: Callable[[object], Path]) -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    layer = module("Linear", _parameters=weights(*(torch.ones(2, dtype=dtype) for dtype in dtypes)))
    attributes = {"sigma_data": 0.6, "model_type": "SongUNet", "sigma_max": None}
    ema = network(layer, _init_kwargs={"sigma_data": 0.5}, **attributes)
    encoder = module("OtherEncoder")
    other = {"dataset_kwargs": ["path"], "net": 1, "optimizer_state": {}}
    official = read_official(write({"ema": ema, "encoder": encoder, **other}))
    assert (official.attributes, official.dataset) == (attributes, None)
    assert official.notes == (
        "entries that official files do not have: 'net', 'optimizer_state'",
        "stored as bfloat16, float16, float32 where official files have float32",
        "made with sigma_data=0.5, changed to 0.6 afterwards",
        "unknown encoder 'OtherEncoder'",
    )


def test_a_vae_has_its_own_statistics_or_the_defaults(write: Callable[[object], Path]) -> None:
    ema = network(module("Linear", _parameters=weights(torch.ones(2))))
    own = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    vae = module("StabilityVAEEncoder", _init_args=("me/vae",), _init_kwargs={"final_std": 2}, **own)
    encoder = read_official(write({"ema": ema, "encoder": vae})).encoder
    assert encoder is not None
    assert (encoder["vae_name"], encoder["final_std"], encoder["raw_std"]) == ("me/vae", 2, [4.17, 4.62, 3.71, 3.28])
    assert (encoder["scale"], encoder["bias"]) == ([1.0] * 4, [0.0] * 4)


def test_structure_is_refused(write: Callable[[object], Path]) -> None:
    shared = module("Linear")
    deep = module("Linear")
    for _ in range(20):
        deep = module("Linear", {"child": deep})
    loop: list[object] = []
    loop.append(loop)
    shared_lists: object = [0] * 10
    for _ in range(4):
        shared_lists = [shared_lists] * 10  # a hundred thousand numbers, in a file of a few hundred bytes
    self_: dict[str, object] = {}
    self_["self"] = self_
    for ema, why in (
        (network(shared, shared), "nests its layers"),
        (network(deep), "nests its layers"),
        *(
            (network(module("Linear", _parameters={name: torch.ones(1)})), "_parameters")
            for name in ("a.b", "a\n", "\xe9")
        ),
        (network(module("Linear", _parameters={"w": 1})), "model.layer0.w"),
        (network(module("Linear", _modules={"child": torch.ones(1)})), "model.layer0.child"),
        (network(module("Linear", _buffers=None)), "_buffers"),
        (network(_init_kwargs={"channel_mult": loop}), "larger than any network's"),
        (network(_init_kwargs={"channel_mult": shared_lists}), "larger than any network's"),
        (network(_init_kwargs={"channel_mult": self_}), "larger than any network's"),
        (network(_init_kwargs={"channel_mult": torch.ones(1)}), "among its arguments"),
        (network(_init_kwargs={"channel_mult": np.ones(100)}), "among its arguments"),
        (module("EDMPrecond", {"model": module("Linear")}), "'Linear' in its EDMPrecond"),
        (module("Precond", {"unet": module("SongUNet2")}), "'SongUNet2'"),
        (module("Precond", {"model": module("UNet")}), "NoneType"),
        (module("EDMLoss"), "'EDMLoss'"),
    ):
        with pytest.raises(CheckpointError, match=why):
            read_official(write({"ema": ema}))


def test_deep_objects(tmp_path: Path) -> None:
    """20,000 objects inside one another are neither followed nor a danger when they are freed."""
    name = b"\x8c\x17torch_utils.persistence\x8c\x1b_reconstruct_persistent_obj\x93"
    meta = b"}(\x8c\x04type\x8c\x05class\x8c\x07versionK\x06\x8c\x0aclass_name\x8c\x06Linear\x8c\x05state}\x8c\x01x"
    program = b"\x80\x04}\x8c\x03ema" + (name + meta) * 20_000 + b"N" + b"su\x85R" * 20_000 + b"s."
    path = tmp_path / "deep.pkl"
    path.write_bytes(program)
    with pytest.raises(CheckpointError, match="'Linear' under 'ema'"):
        read_official(path)


def test_a_state_that_is_no_dict_is_refused(tmp_path: Path) -> None:
    """A ModuleDict is created first and given its state later."""
    path = tmp_path / "state.pkl"
    path.write_bytes(b"\x80\x04}\x8c\x03emactorch.nn.modules.container\nModuleDict\n)\x81]bs.")
    with pytest.raises(CheckpointError, match="damaged"):
        read_official(path)


def test_dict_of_pairs_is_refused(tmp_path: Path) -> None:
    """OrderedDict(pairs) would hash keys of any depth in C."""
    path = tmp_path / "pairs.pkl"
    path.write_bytes(b"\x80\x04ccollections\nOrderedDict\n](" + b")" + b"\x85" * 200_000 + b"N\x86e\x85R.")
    with pytest.raises(CheckpointError, match="damaged"):
        read_official(path)
