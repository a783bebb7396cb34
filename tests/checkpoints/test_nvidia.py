"""Official pickles: every golden one reads exactly, and no bad one costs more than a sentence."""

import gzip
import hashlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from golden_set import BAD, GOLDEN, NETWORKS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from edmdistill.checkpoints import persistence
from edmdistill.checkpoints.nvidia import OfficialCheckpoint, read_official
from edmdistill.errors import CheckpointError

REFUSED_LATER = {"bad-huge-config.pkl", "bad-missing-param.pkl", "bad-shape-flat.pkl", "bad-shape-mismatch.pkl"}
"""Sound as files; only the network they are for shows that they are not."""
HARMLESS = {"bad-modulesrc-exec.pkl", "bad-unknown-kwarg.pkl"}


def from_json(value: object) -> object:
    """The golden tables write infinity as a word."""
    return math.inf if value == "inf" else value


# The golden pickles.


@pytest.mark.parametrize("name", NETWORKS)
def test_golden(name: str) -> None:
    path = GOLDEN / name
    facts = json.loads((path.parent / f"{path.name.partition('.pkl')[0]}.json").read_text())
    official = read_official(path)
    assert official.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert official.preconditioning_class == facts["ema"]["class_name"]
    assert official.network_class == facts["inner"]["class_name"]
    assert official.arguments == facts["ema"]["init_kwargs"]
    assert official.network_arguments == facts["inner"]["init_kwargs"]
    assert official.attributes == {key: from_json(value) for key, value in facts["ema"]["attributes"].items()}

    assert official.stored.keys() == facts["tensors"].keys() == official.tensors.keys()
    for tensor_name, expected in facts["tensors"].items():
        tensor = official.tensors[tensor_name]
        assert list(tensor.shape) == list(official.stored[tensor_name].shape) == expected["shape"]
        assert str(tensor.dtype) == f"torch.{official.stored[tensor_name].dtype}" == f"torch.{expected['dtype']}"
        assert (tensor_name in official.buffers) == (expected["kind"] == "buffer")
        assert hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() == expected["sha256"]

    for part, found in (("loss_fn", official.loss), ("augment_pipe", official.augment), ("encoder", official.encoder)):
        expected = facts.get(part)
        assert (found is None) == (expected is None)
        if found is not None:
            assert (found["class_name"], found["arguments"]) == (expected["class_name"], expected["init_kwargs"])
    assert official.dataset == facts.get("dataset_kwargs", {}).get("value")
    only = facts["top_level"]["keys"] == ["ema"]
    assert official.notes == (("only the network: no record of loss, data set or encoder",) if only else ())


def test_positional_order(golden: Path) -> None:
    """The tables of parameters are in the official order, which the golden `full_kwargs` are in too."""
    for name in NETWORKS:
        facts = json.loads((golden / f"{name.partition('.pkl')[0]}.json").read_text())
        for part in ("ema", "inner", "encoder"):
            item = facts.get(part, {})
            table = persistence.CONSTRUCTOR_PARAMETERS.get(item.get("class_name"), ())
            assert [key for key in item.get("full_kwargs", ()) if key in table] == list(table)


def test_vae_statistics(golden: Path) -> None:
    official = read_official(golden / "edm2-latent-cond.pkl")
    encoder = official.encoder
    assert encoder is not None
    mean, std, scale, bias = (torch.tensor(encoder[key]) for key in ("raw_mean", "raw_std", "scale", "bias"))
    assert torch.allclose(scale, encoder["final_std"] / std)
    assert torch.allclose(bias, encoder["final_mean"] - mean * scale)
    assert encoder["vae_name"] == "stabilityai/sd-vae-ft-mse"


def test_tensors_are_ours(golden: Path) -> None:
    """They can be written to, and do not hold the file open."""
    official = read_official(golden / "edm-tiny-cond.pkl")
    before = read_official(golden / "edm-tiny-cond.pkl").tensors
    for name, tensor in official.tensors.items():
        assert tensor.data_ptr() % tensor.element_size() == 0
        tensor.add_(1)
        assert torch.equal(tensor, before[name] + 1)


# The bad pickles.


@pytest.mark.parametrize("name", BAD)
def test_bad(bad: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = bad / name
    if name in REFUSED_LATER | HARMLESS:
        assert isinstance(read_official(path), OfficialCheckpoint)
    else:
        with pytest.raises(CheckpointError) as caught:
            read_official(path)
        sentence = str(caught.value)
        assert sentence.startswith(str(path))
        assert sentence.endswith(".")
        assert "\n" not in sentence
        assert ": " in sentence  # what to do
        assert len(sentence) < len(str(path)) + 300
    assert not list(tmp_path.iterdir())


def test_bad_list_is_whole(bad: Path) -> None:
    assert sorted(path.name for path in bad.glob("bad-*.pkl")) == BAD


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bad-os-system.pkl", ["'os.system'", "nothing was executed"]),
        ("bad-nested-storage2.pkl", ["'os.system'"]),
        ("bad-persistence-attr.pkl", ["'torch_utils.persistence.sys.modules'", "PyPI"]),
        ("bad-statedict-torchsave.pkl", ["zip archive of torch.save", "network pickle"]),
        ("bad-statedict-legacy.pkl", ["file of torch.save", "network pickle"]),
        ("bad-statedict-pickle.pkl", ["dict of tensors", "network pickle"]),
        ("bad-unknown-inner-class.pkl", ["'UNetBlockV9'", "model.enc.8x8_block0"]),
        ("bad-dtype-int.pkl", ["int64", "model.map_augment.weight"]),
        ("bad-version.pkl", ["version 99"]),
        ("bad-metatype.pkl", ["'function'"]),
        ("bad-no-ema.pkl", ["'loss_fn'", "'ema'"]),
        ("bad-list.pkl", ["list", "'ema'"]),
        ("bad-oob-tensor.pkl", ["(4, 3)", "4 numbers"]),
        ("bad-storage-numel.pkl", ["1,099,511,627,776"]),
        ("bad-html.pkl", ["web page"]),
        ("bad-truncated.pkl", ["byte 26,466"]),
    ],
)
def test_sentences(bad: Path, name: str, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_official(bad / name)
    assert all(word in str(caught.value) for word in words)


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that would take all memory or time of a reader that believes them."""
    for name, instruction in (("sets", b"\x8f"), ("blobs", b"C\0"), ("memo", b")\x94")):
        yield name, b"\x80\x04" + instruction * 1_000_000
    yield "memo-index", b"\x80\x04}\x94r\xff\xff\xff\xff."
    yield "gzip", gzip.compress(bytes(400_000_000), compresslevel=1)


def test_every_refusal_says_what_to_do(bad: Path) -> None:
    refused = []
    for path in sorted(bad.iterdir()):
        try:
            read_official(path)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 30
    advice = re.compile("[:;] (download|get|give|use) [^:;]*\\.$|do not install|see what the address shows")
    assert [sentence for sentence in refused if not advice.search(sentence)] == []


def test_bad_files_cost_nothing(bad: Path, tmp_path: Path) -> None:
    """All bad files and bombs in one process: under 300 MB in all, nothing run, nothing left."""
    for name, program in bombs():
        (tmp_path / f"{name}.pkl").write_bytes(program)
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    script = """
import sys
from contextlib import suppress
from pathlib import Path
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.errors import CheckpointError
for path in sys.argv[1:]:
    with suppress(CheckpointError):
        read_official(path)
    print(path)
# Not ru_maxrss: a process inherits the peak of the one that started it.
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
assert "torch" not in sys.modules
"""
    files = [*map(str, tmp_path.glob("*.pkl")), *(str(bad / name) for name in BAD)]
    run = [sys.executable, "-c", script, *files]
    result = subprocess.run(
        run, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert result.returncode == 0, result.stderr
    *read, peak = result.stdout.splitlines()
    assert read == files
    assert int(peak) < 300 * 1024
    assert not list(cwd.iterdir())


TINY = (GOLDEN / "edm-tiny-cond.pkl").read_bytes()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.integers(0, len(TINY) - 1), st.lists(st.tuples(st.integers(0, len(TINY) - 1), st.integers(0, 255)), max_size=4)
)
@example(len(TINY) - 1, [])
def test_damage_only_raises_checkpoint_errors(tmp_path: Path, length: int, flips: list[tuple[int, int]]) -> None:
    """A cut file never loads; a file with changed bytes loads or is refused, and nothing else happens."""
    path = tmp_path / "damaged.pkl"
    path.write_bytes(TINY[:length])
    with pytest.raises(CheckpointError):
        read_official(path)
    changed = bytearray(TINY)
    for position, value in flips:
        changed[position] = value
    path.write_bytes(changed)
    try:
        official = read_official(path)
    except CheckpointError:
        pass
    else:
        assert all(tensor.numel() for tensor in official.tensors.values())
    assert list(tmp_path.iterdir()) == [path]


# Files made here, in the official layout.


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
        _non_persistent_buffers_set={"passing"},
        _forward_hooks=EasyDict(),
        _forward_pre_hooks={0: None},
        up=True,
        extra=[EasyDict(a=1), (1, 2.5, None), {"x"}],
    )
    official = read_official(write(EasyDict(ema=network(layer)), protocol))
    assert list(official.tensors) == ["model.layer0.w0", "model.layer0.w1", "model.layer0.kept"]
    assert official.buffers == {"model.layer0.kept"}
    assert torch.equal(official.tensors["model.layer0.w0"], tied[2:].reshape(2, 2).t())


def test_sidas_classes_are_nvidias_for_a_generator_alone(write: Callable[..., Path]) -> None:
    own = {"force_normalization": True, "use_gan": False}
    inner = module("UNet_EncoderDecoder", _init_kwargs={**own, "model_channels": 8})
    path = write({"ema": module("EDM_2_Precond_Generator", {"unet": inner}, _init_kwargs=own)})
    official = read_official(path, generator=True)
    assert (official.preconditioning_class, official.network_class) == ("Precond", "UNet")
    assert (official.arguments, official.network_arguments) == ({"logvar_channels": 0}, {"model_channels": 8})
    with pytest.raises(CheckpointError, match="a one-step generator and not a teacher"):
        read_official(path)
    inner = module("UNet", _init_kwargs={"dropout_res": 8})  # ECT's of ImageNet 64x64
    official = read_official(write({"ema": module("Precond", {"unet": inner})}), generator=True)
    assert (official.arguments, official.network_arguments) == ({"logvar_channels": 0}, {})


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({1: 2}, "holds a value of type dict"),
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
    layer = module("Linear", _parameters=weights(torch.ones(2, dtype=torch.float16)))
    ema = network(layer, _init_kwargs={"sigma_data": 0.5}, sigma_data=0.6)
    encoder = module("OtherEncoder")
    notes = read_official(write({"ema": ema, "encoder": encoder, "net": 1, "optimizer_state": {}})).notes
    assert notes == (
        "entries that official files do not have: 'net', 'optimizer_state'",
        "stored as float16 where official files have float32",
        "made with sigma_data=0.5, changed to 0.6 afterwards",
        "unknown encoder 'OtherEncoder'",
    )


def test_structure_is_refused(write: Callable[[object], Path]) -> None:
    shared = module("Linear")
    deep = module("Linear")
    for _ in range(20):
        deep = module("Linear", {"child": deep})
    loop: list[object] = []
    loop.append(loop)
    shared_lists: object = [0] * 10
    for _ in range(7):
        shared_lists = [shared_lists] * 10  # ten million numbers, in a file of a few hundred bytes
    for ema, why in (
        (network(shared, shared), "nests its layers"),
        (network(deep), "nests its layers"),
        (network(module("Linear", _parameters={"a.b": torch.ones(1)})), "_parameters"),
        (network(module("Linear", _parameters={"w": 1})), "model.layer0.w"),
        (network(module("Linear", _modules={"child": torch.ones(1)})), "model.layer0.child"),
        (network(module("Linear", _buffers=None)), "_buffers"),
        (network(_init_kwargs={"channel_mult": loop}), "larger than any network's"),
        (network(_init_kwargs={"channel_mult": shared_lists}), "larger than any network's"),
        (network(_init_kwargs={"channel_mult": torch.ones(1)}), "among its arguments"),
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


def test_dict_of_pairs_is_refused(tmp_path: Path) -> None:
    """OrderedDict(pairs) would hash keys of any depth in C."""
    path = tmp_path / "pairs.pkl"
    path.write_bytes(b"\x80\x04ccollections\nOrderedDict\n](" + b")" + b"\x85" * 200_000 + b"N\x86e\x85R.")
    with pytest.raises(CheckpointError, match="damaged"):
        read_official(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x10\0\0\0\0\0\0\0" + b'{"a":{}}' * 3, "safetensors"),
        (gzip.compress(TINY)[:-100], "gzip"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "other.pkl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        read_official(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_official(tmp_path / "none.pkl")
    with pytest.raises(CheckpointError, match="not a file"):
        read_official(tmp_path)


def test_gzip_reads_the_same(tmp_path: Path, golden: Path) -> None:
    packed = tmp_path / "tiny.pkl.gz"
    packed.write_bytes(gzip.compress(TINY))
    one, other = read_official(packed), read_official(golden / "edm-tiny-cond.pkl")
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert one.sha256 != other.sha256
