"""Files that cannot be read: the sentence says what they are, and what to do that helps."""

import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from golden_set import GOLDEN

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.inspect import inspect
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import load_official
from edmdistill.checkpoints.published_generators import GENERATORS, convert_generator
from edmdistill.checkpoints.source import resolve
from edmdistill.cli import main
from edmdistill.errors import CheckpointError

CASES = Path(__file__).parent.parent / "cases"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("ckpt.pth", "'model', 'epoch'.*weights under 'model': write these alone"),
        ("training-state-000500.pt", r"training state.*network-snapshot-000500\.pkl"),
        ("unet.safetensors", "is a safetensors file.*network pickle"),
    ],
)
def test_cases(name: str, why: str) -> None:
    for read in (load_official, inspect):
        with pytest.raises(CheckpointError, match=rf"^[^\n]*{why}[^\n]*$"):
            read(CASES / name)


@pytest.mark.parametrize("method", GENERATORS)
def test_files_that_hold_no_generator(method: str, tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "words.pt").write_text("not found")
    for name, why in (("empty.pt", "is empty: download it again"), ("words.pt", "(is damaged, or no|is not a zip)")):
        with pytest.raises(CheckpointError, match=f"{name} {why}"):
            convert_generator(tmp_path / name, tmp_path / "out", method)
    if GENERATORS[method].summary.endswith(("*.pt", ".bin")):
        with pytest.raises(CheckpointError, match=r"is not a zip archive, which torch\.save writes since"):
            convert_generator(GOLDEN / "edm-tiny-cond.pkl", tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_a_training_state_names_what_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "training-state-0002048.pt"
    torch.save({"net": {"a": torch.ones(1)}, "optimizer_state": {"state": {0: torch.ones(1)}}}, path)
    with pytest.raises(CheckpointError, match=r"beside it, network-snapshot-0002048\.pkl"):
        load_official(path)
    for name in ("0004096-0.100", "0002048-0.100", "0002048-0.050"):
        (tmp_path / f"network-snapshot-{name}.pkl").touch()
    with pytest.raises(CheckpointError, match=r"give the network-snapshot beside it, network-snapshot-0002048-0\.100"):
        load_official(path)
    other = path.rename(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="is a training state"):
        load_official(other)


def test_diffusers_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"down_blocks.0.x": torch.ones(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="diffusers' names"):
        load_official(tmp_path / "unet.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a safetensors file"):
        load_official(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="diffusers' names"):
        load_official(tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match=f"is a part of a checkpoint: give its folder, {tmp_path}"):
        load_official(tmp_path / "model.safetensors")


@pytest.mark.parametrize("header", [b'{"a', b'{"a": ' + b"[" * 100_000], ids=["cut", "deep"])
def test_headers_that_are_no_json(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "unet.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="is a safetensors file, which holds weights"):
        load_official(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_zip_is_cut(tmp_path: Path, share: float) -> None:
    content = (CASES / "ct_imagenet64.pt").read_bytes()
    path = tmp_path / "edm_imagenet64_ema.pt"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="zip archive that is cut short or damaged: download it again"):
        load_official(path)


def test_odd_archives(tmp_path: Path) -> None:
    path = tmp_path / "edm.pt"
    for method, why in ((zipfile.ZIP_BZIP2, "packed by method 12"), (zipfile.ZIP_DEFLATED, "asks for|damaged|without")):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x/data.pkl", b"ignored" * 10)
        with pytest.raises(CheckpointError, match=why):
            load_official(path)
    encrypted = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(mark) + offset] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(CheckpointError, match="encrypted"):
        load_official(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "")
        archive.writestr("b/c.txt", "")
    with pytest.raises(CheckpointError, match="not one that torch"):
        load_official(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pkl")
    os.mkfifo(tmp_path / "model.safetensors")
    for source in (tmp_path / "pipe.pkl", "/dev/zero", tmp_path):
        with pytest.raises(CheckpointError, match="a pipe or a device"):
            resolve(source)


@pytest.mark.parametrize("source", ["~nobody-there/x.pkl", "x" * 5000, "a\0b", "/a/" + "b/" * 3000, "ftp://h/x.pkl"])
def test_sources_that_are_none(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"^[^\n]{1,700}$"):
        resolve(source)


def test_inspect_reads_what_convert_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edmdistill.checkpoints import openai

    tensors = {"a.weight": torch.ones(2, 3)}
    monkeypatch.setattr(openai, "to_adm", lambda weights: ({"img_resolution": 64}, {}))
    path = tmp_path / "edm_imagenet64_ema.pt"
    torch.save(tensors, path)
    summary = inspect(path)
    assert summary["sha256"] == sha256_file(path)
    assert (summary["parameters"], summary["dtypes"]) == (6, {"float32": 1})
    assert summary["network"] == {"kind": "adm", "img_resolution": 64}
    assert summary["tensors"] == {"a.weight": ["float32", [2, 3]]}


def test_classes(tmp_path: Path) -> None:
    from edmdistill.checkpoints.convert import convert

    teacher = tmp_path / "run" / "generator"
    convert("digits", teacher)
    assert inspect(tmp_path / "run")["file"] == str(teacher)
    done = CliRunner().invoke(main, ["inspect", "--classes", str(GOLDEN / "edm2-rgb-uncond.pkl.gz")])
    assert done.exit_code == 2
    assert "has no classes" in done.output


def test_random_changes_end_in_one_sentence(tmp_path: Path) -> None:
    good, path = (GOLDEN / "edm-tiny-cond.pkl").read_bytes(), tmp_path / "edm.pkl"
    weights = (CASES / "ct_imagenet64.pt").read_bytes()
    rng, said = random.Random(0), []
    for trial in range(300):
        bad = bytearray(weights if trial % 3 == 0 else good)
        for _ in range(rng.randint(1, 6)):
            start = rng.randrange(len(bad))
            match rng.randrange(3):
                case 0:
                    bad[start] = rng.randrange(256)
                case 1:
                    del bad[start : start + rng.randint(1, 9)]
                case 2:
                    other = rng.randrange(len(bad))
                    bad[start:start] = bad[other : other + rng.randint(1, 40)]
        path.write_bytes(bad)
        try:
            (inspect if trial % 3 == 0 else read_official)(path)
        except CheckpointError as error:
            said.append(str(error))
    assert len(said) > 100
    assert not any("\n" in sentence for sentence in said)
