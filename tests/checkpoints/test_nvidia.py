"""Official pickles: every golden one reads exactly, and no bad one costs more than a sentence."""

import gzip
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_set import BAD, GOLDEN, NETWORKS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

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
        assert not sentence.endswith(".")
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
    advice = re.compile("[:;] (download|get|give|use) [^:;]*[^:;.]$|do not install|see what the address shows")
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


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n <!DOCTYPE html>", "web page"),
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
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_official(tmp_path)


def test_gzip_reads_the_same(tmp_path: Path, golden: Path) -> None:
    packed = tmp_path / "tiny.pkl.gz"
    packed.write_bytes(gzip.compress(TINY))
    one, other = read_official(packed), read_official(golden / "edm-tiny-cond.pkl")
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert one.sha256 != other.sha256
