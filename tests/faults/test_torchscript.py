"""TorchScript files of strangers: arithmetic passes, and nothing else runs, neither on loading nor on a call."""

import io
import random
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from script_files import Maps, script
from torch import Tensor, nn

from edmdistill.archives import MAX_PACKED
from edmdistill.errors import CheckpointError
from edmdistill.features.classifiers import load_classifier
from edmdistill.features.perceptual import PerceptualDistance, ScriptFeatures
from edmdistill.features.script import CONTROL, OPERATORS, Script, load_script
from edmdistill.sampling.reference import load_feature_net


class Plain(nn.Module):
    def forward(self, x: Tensor, y: int = 3) -> Tensor:
        return x + y


PLAIN = b"    return torch.add(x, y)"


def save(module: nn.Module, path: Path) -> Path:
    torch.jit.save(torch.jit.script(module), str(path))
    return path


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A copy of an archive, each member changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            content = change(name, old.read(info))
            if not name.endswith("debug_pkl"):
                new.writestr(f"x/{name}", content)
    return target


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return save(Plain(), tmp_path / "plain.pt")


def forged(plain: Path, old: bytes, new: bytes) -> Path:
    """The plain network with other source text."""

    def change(name: str, content: bytes) -> bytes:
        if name.endswith(".py"):
            assert old in content
            return content.replace(old, new)
        return content

    return rewrite(plain, plain.with_name("forged.pt"), change)


class Layers(nn.Module):
    """What pretrained networks are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.GELU(), nn.MaxPool2d(2))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.dropout, self.head = nn.LayerNorm(8), nn.Dropout(), nn.Linear(8, 4)
        self.table = {"mean": torch.ones(3, 1, 1)}
        self.register_buffer("none", torch.zeros(0))
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, 'it\'s "wrong"\n'
        x = nn.functional.interpolate(x - self.table["mean"], scale_factor=2.0, mode="bilinear")
        x = self.body(x).flatten(2).transpose(1, 2)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        for size in self.sizes:
            x = x * float(size) if size < 5 else x.clamp(min=float("-inf"))
        with torch.no_grad():
            y = x.softmax(-1)
        return self.head(self.dropout(x.mean(1) + y.mean(1)))


@pytest.mark.parametrize("trace", [False, True], ids=["script", "trace"])
def test_honest_networks_are_read_as_torch_reads_them(tmp_path: Path, trace: bool) -> None:
    network, x = Layers().eval(), torch.randn(2, 3, 6, 6)
    path = tmp_path / "network.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(
            torch.jit.trace(network, x, check_trace=False) if trace else torch.jit.script(network), str(path)
        )
    torch.testing.assert_close(load_script(path)(x), network(x))
    assert not any(p.requires_grad for p in load_script(path).parameters())


def test_what_is_allowed_exists_and_takes_no_files() -> None:
    schemas = torch._C._jit_get_all_schemas()
    known = {schema.name.removeprefix("aten::").removesuffix("_") for schema in schemas}
    assert not {name.removesuffix("_") for name in OPERATORS} - known
    assert not OPERATORS & {"from_file", "save", "set", "set_data", "fork", "wait", "manual_seed", "record_stream"}
    assert not CONTROL & {
        "PythonOp",
        "IgnoredPythonOp",
        "Print",
        "fork",
        "rpc_async",
        "rpc_sync",
        "rpc_remote",
        "Closure",
    }
    for schema in schemas:
        space, _, name = schema.name.partition("::")
        if space == "aten" and name.removesuffix("_") in OPERATORS:
            assert not {argument.name for argument in schema.arguments} & {"filename", "fname"}


# What runs on a call.

ATTEMPTS = {
    "aten::from_file": b'    return torch.add(x, torch.sum(torch.from_file("VICTIM", True, 16, dtype=0)))',
    "aten::save": b'    torch.save(x, "VICTIM")\n    return x',
    "prim::Print": b'    print("x")\n    return x',
    "prim::fork": b"    return torch.wait(fork(self.forward, x, y))",
    "aten::set_": b"    return torch.set_(x, x)",
    "aten::_cuda_getCurrentRawStream": b"    return torch._cuda_getCurrentRawStream(x)",
    "quantized::linear": b"    return ops.quantized.linear(x, x, 1.0, 0)",
    "prim::rpc_sync": b'    return rpc_sync("worker", self.forward, (x,))',
    "aten::get_pooling": b"    return torch.get_pooling(x)",
    "os.system": b'    os.system("touch VICTIM")\n    return x',
}


@pytest.mark.parametrize("operator", ATTEMPTS)
def test_other_operators_are_refused_before_they_run(plain: Path, operator: str) -> None:
    victim = plain.with_name("victim")
    body = ATTEMPTS[operator].replace(b"VICTIM", str(victim).encode())
    with pytest.raises(
        CheckpointError, match=r"^[^\n]+ cannot be read as TorchScript.*: write (it with|the network without it)"
    ):
        load_script(forged(plain, PLAIN, body))
    assert not victim.exists()


def write_(x: Tensor) -> Tensor:
    return torch.from_file("victim", True, 16, dtype=torch.uint8) + x


class Indirect(nn.Module):
    """Reaches the operator by a function, from a method that forward does not call, in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def other(self, x: Tensor) -> Tensor:
        return write_(x)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(before)

    def forward(self, x: Tensor) -> Tensor:
        return x


def before(self, x: tuple[Tensor]) -> tuple[Tensor]:  # type: ignore[no-untyped-def]
    return (write_(x[0]),)


@pytest.mark.parametrize("network", [Indirect, Hooked])
def test_operators_are_found_wherever_they_hide(tmp_path: Path, network: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="uses aten::from_file"):
        load_script(save(network(), tmp_path / "x.pt"))
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "use",
    [
        lambda path: load_classifier(path, 4),
        lambda path: load_feature_net(path, 3, 8),
        lambda path: PerceptualDistance(path),
        lambda path: ScriptFeatures(path),
    ],
)
def test_every_reader_of_such_files_checks(plain: Path, use: Callable[[str], object]) -> None:
    path = forged(plain, PLAIN, ATTEMPTS["aten::save"].replace(b"VICTIM", str(plain.with_name("victim")).encode()))
    with pytest.raises(CheckpointError, match="uses aten::save"):
        use(str(path))
    assert not plain.with_name("victim").exists()


# What runs on loading.


VALUE, SYNTAX = r"a default value that is no literal", "holds code as torch does not write it: write it with torch.jit"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"y: int=3", b'y: int=len(torch.from_file("VICTIM", True, 16, dtype=0))', VALUE),
        (b"y: int=3", b'y: int=3, z: bool=torch.save(3, "VICTIM") is None', VALUE),
        (b"y: int=3", b'*, y: bool=torch.save(3, "VICTIM") is None', VALUE),
        (
            b"  training : bool",
            b'  k : Final[int] = len(torch.from_file("VICTIM", True, 16, dtype=0))\n  training : bool',
            VALUE,
        ),
        (b"  training : bool", b'  training : bool\n  torch.save(3, "VICTIM")', VALUE),
        (b"  def forward", b'  @torch.save(3, "VICTIM")\n  def forward', VALUE),
        (
            b"  def forward",
            b"  def __setstate__(self, state: int) -> NoneType:\n    return None\n  def forward",
            "__setst",
        ),
        (b"  def forward", b"  def __getstate__(self) -> int:\n    return 1\n  def forward", r"\(__getstate__\)"),
        (b"class Plain", b"class T(NamedTuple):\n  a : int = torch.sum(ones)\nclass Plain", VALUE),
        (
            b"  training : bool",
            b"  training : bool\n  c : __torch__.torch.classes.quantized.LinearPackedParamsBase",
            r"uses a class of C\+\+ \(torch\.classes\)",
        ),
        (b"y: int=3", b"y: int=3\n\n# a comment \n", SYNTAX),
        (b"y: int=3", b"y: int=\\\n3", SYNTAX),
        (b"torch.add(x, y)", b"torch.add(x, y) # torch.add(x, y)", SYNTAX),
        (b"torch.add(x, y)", b"torch.add(x, len(f'{x}'))", SYNTAX),
        (b"torch.add(x, y)", b"torch.add(x, len('\xc3\xa4'))", SYNTAX),
        (b"torch.add(x, y)", b'torch.add(x, len("""\n"""))', SYNTAX),
        (b"torch.add(x, y)", b"torch.add(x, len('\\x1b[2J'))", "holds a text of control characters"),
        pytest.param(
            b"torch.add(x, y)", b"torch.add(x, " + b"(" * 5000 + b"y" + b")" * 5000 + b")", SYNTAX, id="parentheses"
        ),
        pytest.param(b"torch.add(x, y)", b"torch.add(x, " + b"-" * 100_000 + b"y)", SYNTAX, id="signs"),
    ],
)
def test_nothing_runs_on_loading(plain: Path, old: bytes, new: bytes, sentence: str) -> None:
    """Each is found by the check that is for it."""
    victim = plain.with_name("victim")
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{sentence}[^\n]*$"):
        load_script(forged(plain, old, new.replace(b"VICTIM", str(victim).encode())))
    assert not victim.exists()


def test_no_classes_of_c(tmp_path: Path, plain: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "fbgemm" in torch.backends.quantized.supported_engines:
            quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), dtype=torch.qint8)
            with pytest.raises(CheckpointError, match=r"torch\.classes"):
                load_script(save(quantized, tmp_path / "q.pt"))
    data = zipfile.ZipFile(plain).read("plain/data.pkl")
    data = re.sub(rb"c__torch__[\w.]*\n", b"c__torch__.torch.classes.rnn\n", data)
    with pytest.raises(CheckpointError, match=r"'__torch__\.torch\.classes\.rnn\.Plain'.*nothing was executed"):
        load_script(rewrite(plain, tmp_path / "x.pt", lambda name, old: data if name == "data.pkl" else old))


# What is read where nothing is.


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data.pkl", b"K\x08tQ", b"K\x09tQ"),  # the storage is longer than its member
        ("data.pkl", b"K\x00(K\x08t", b"K\x04(K\x08t"),  # the tensor begins too late
        ("data/0", bytes(4), b""),
    ],
)
def test_tensors_stay_inside_the_file(tmp_path: Path, name: str, old: bytes, new: bytes) -> None:
    """torch itself reads whatever lies behind them in memory."""
    source = save(Weighted(), tmp_path / "w.pt")

    def change(member: str, content: bytes) -> bytes:
        if member == name:
            assert old in content
            return content.replace(old, new, 1)
        return content

    with pytest.raises(CheckpointError, match="damaged"):
        load_script(rewrite(source, tmp_path / "x.pt", change))


def test_members_have_one_reading(plain: Path, tmp_path: Path) -> None:
    """torch finds CODE/__TORCH__.PY where it looks for code/__torch__.py."""
    other = rewrite(plain, tmp_path / "x.pt", lambda name, old: old)
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr(next(name for name in archive.namelist() if name.endswith(".py")).upper(), b"")
    with pytest.raises(CheckpointError, match="not one that torch"):
        load_script(other)


def test_bombs(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    path.write_bytes(plain.read_bytes())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("plain/code/more.py", b" " * (MAX_PACKED + 1))
    with pytest.raises(CheckpointError, match="unfolds to"):
        load_script(path)


def test_random_changes_end_in_one_sentence(plain: Path, tmp_path: Path) -> None:
    good, rng, path = plain.read_bytes(), random.Random(0), tmp_path / "x.pt"
    said = []
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        path.write_bytes(bad[: rng.choice((len(bad), len(bad), rng.randrange(len(bad))))])
        try:
            load_script(path)
        except CheckpointError as error:
            said.append(str(error))
    assert len(said) > 50
    assert not any("\n" in sentence for sentence in said)


# What is said.


class Warns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("\x1b[2J\u202e", stacklevel=2)  # which is not ASCII and stored apart
        warnings.warn("%c[2J" % 27, stacklevel=2)  # noqa: UP031  # the only way in TorchScript
        return x


@pytest.mark.parametrize("action", ["default", "always", "error"])
def test_what_a_script_warns_of_is_not_said(tmp_path: Path, action: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(Warns(), tmp_path / "warns.pt")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter(action)
        assert Script(path)(torch.ones(2)).sum() == 2
    assert not [warning for warning in said if "[2J" in str(warning.message)]
    assert capfd.readouterr().err == ""


def test_other_files(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"holds weights without a network's code.*torch\.jit\.save"):
        load_script(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_script(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_script(tmp_path / "none.pt")


def test_a_script_that_fails_is_one_sentence(tmp_path: Path) -> None:
    path = script(Maps(), tmp_path / "maps.pt", torch.zeros(1, 3, 224, 224))
    with pytest.raises(CheckpointError, match=r"fails on images of shape \[1, 4, 8, 8\] \([^\n]+\): use a script"):
        Script(path)(torch.zeros(1, 4, 8, 8))
    identity = save(Plain(), tmp_path / "plain.pt")
    assert torch.equal(Script(identity)(torch.ones(1)), torch.tensor([4.0]))
    assert io.BytesIO(identity.read_bytes()).read(2) == b"PK"


def test_a_script_that_takes_too_much_memory_is_no_fault_of_it(tmp_path: Path) -> None:
    """TorchScript makes a RuntimeError of CUDA's error, at the end of its own source."""
    file = Script(script(Maps(), tmp_path / "maps.pt", torch.zeros(1, 3, 224, 224)))

    class Full(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(
                "The following operation failed in the TorchScript interpreter\nRuntimeError: out of memory"
            )

    file.script = Full()
    with pytest.raises(torch.OutOfMemoryError, match=r"^out of memory$"):
        file.run(torch.zeros(1))
