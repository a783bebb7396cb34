"""Encoding: the official latents in EDM2's layout, by several processes, through kills, and what is refused."""

import io
import json
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edmdistill.checkpoints.encoder import STABLE_DIFFUSION, ChannelStatistics, Encoding, latent_encoder
from edmdistill.checkpoints.vae import Vae, read_vae
from edmdistill.data import encode as module
from edmdistill.data import latent_zip
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.encode import EncodeJob, compare_statistics, far_off
from edmdistill.data.latents import channel_statistics, draw_latents
from edmdistill.errors import DatasetError


@pytest.fixture(scope="module")
def case(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "evaluation/latents/expected.safetensors")


@pytest.fixture(scope="module")
def vae(golden: Path) -> Vae:
    return read_vae(str(golden / "evaluation/latents/tiny-vae"))


@pytest.fixture
def images(tmp_path: Path, case: dict[str, torch.Tensor]) -> Path:
    """The three images of the golden case, with classes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(case["pixels_u8"]):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    document = {
        "labels": [[f"{i}.png", 2 - i] for i in range(3)],
        "label_names": ["a", "b", "c"],
        "prepared": {"transform": "center-crop", "source": "pictures"},
    }
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


def encode(job: EncodeJob) -> ChannelStatistics | None:
    job.encode()
    return job.finish()


def read_as_official(path: Path) -> tuple[list[str], list[Any], list[int]]:
    """Names, arrays and labels, as EDM2's training/dataset.py reads them."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = sorted(name for name in archive.namelist() if name.endswith(".npy"))
        arrays = [np.load(io.BytesIO(archive.read(name))) for name in names]
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
    return names, arrays, [labels[name] for name in names]


def test_the_official_data_set(images: Path, vae: Vae, case: dict[str, torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "latents.zip"
    measured = encode(EncodeJob(open_dataset(images), vae, "edm2", out))
    names, arrays, labels = read_as_official(out)
    assert names == [f"00000/img-mean-std-0000000{i}.npy" for i in range(3)]
    assert labels == [2, 1, 0]
    assert {(array.dtype.str, array.shape) for array in arrays} == {("<f4", (8, 8, 8))}
    torch.testing.assert_close(torch.from_numpy(np.stack(arrays)), case["mean_std"], rtol=0, atol=1e-5)
    data = open_dataset(out)
    assert (data.latent, data.img_channels, data.img_resolution, data.label_dim) == (True, 4, 8, 3)
    assert data.label_names == ["a", "b", "c"]
    assert data.prepared == {"transform": "center-crop", "source": "pictures"}
    assert measured is not None
    assert [*measured.mean, *measured.std] == pytest.approx(torch.cat([
        torch.tensor(values) for values in channel_statistics(case["mean_std"])
    ]).tolist(), rel=1e-4)  # fmt: skip
    assert data.encoding is not None
    assert (data.encoding.vae_name, data.encoding.vae_sha256, data.encoding.range) == ("tiny-vae", vae.sha256, "edm2")
    assert data.encoding.raw_std == pytest.approx(measured.std)  # far from the tiny VAE's declared ones
    assert not (tmp_path / "deep" / ".latents.zip.parts").exists()


def test_a_network_made_for_latents_sees_unit_scale(
    vae: Vae, images: Path, case: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    encode(EncodeJob(open_dataset(images), vae, "scm", tmp_path / "latents.zip"))
    data = open_dataset(tmp_path / "latents.zip")
    assert data.encoding is not None
    encoder = latent_encoder(data.encoding.encoder(0.5))
    assert encoder is not None
    assert (encoder.range, encoder.vae_sha256) == ("scm", vae.sha256)
    moments = data.tensors(range(3))[0]
    torch.testing.assert_close(moments, vae.encode(case["pixels_u8"], "scm"), rtol=0, atol=1e-5)
    mean, std = channel_statistics(
        torch.cat([draw_latents(moments, torch.zeros(()), encoder), torch.zeros(3, 4, 8, 8)], dim=1)
    )
    assert mean == pytest.approx([0] * 4, abs=1e-5)
    spread = moments[:, 4:].square().mean((0, 2, 3)).sqrt() * torch.tensor(encoder.scale)
    assert torch.tensor(std).square() + spread.square() == pytest.approx(torch.full((4,), 0.25).numpy(), abs=1e-4)


def test_mirrored_images_follow_the_others(
    images: Path, vae: Vae, case: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    encode(EncodeJob(open_dataset(images, xflip=True), vae, "edm2", tmp_path / "latents.zip"))
    names, arrays, labels = read_as_official(tmp_path / "latents.zip")
    assert names[-1] == "00000/img-mean-std-00000005.npy"
    assert labels == [2, 1, 0, 2, 1, 0]
    both = torch.cat([case["mean_std"], vae.encode(case["pixels_u8"].flip(-1), "edm2")])
    torch.testing.assert_close(torch.from_numpy(np.stack(arrays)), both, rtol=0, atol=1e-5)


def test_gray_images_are_repeated_and_may_have_no_classes(vae: Vae, tmp_path: Path) -> None:
    gray = np.arange(2 * 16 * 16, dtype=np.uint16).reshape(2, 1, 16, 16).astype(np.uint8)
    data = Dataset("gray", "train", ["0", "1"], gray.__getitem__)
    encode(EncodeJob(data, vae, "edm2", tmp_path / "latents.zip"))
    latents = open_dataset(tmp_path / "latents.zip")
    assert latents.label_dim == 0
    expected = vae.encode(torch.from_numpy(gray).repeat(1, 3, 1, 1), "edm2")
    torch.testing.assert_close(latents.tensors(range(2))[0], expected, rtol=0, atol=1e-5)


def test_several_processes_and_a_kill(
    images: Path, vae: Vae, case: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process is killed in the middle of its second image; then one process goes on alone."""
    monkeypatch.setattr(module, "CHUNK", 1)
    out = tmp_path / "latents.zip"
    first, second = (EncodeJob(open_dataset(images, xflip=True), vae, "edm2", out, rank, 2) for rank in range(2))
    assert encode(first) is None
    assert not out.exists()

    def die(written: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        second.encode(die)
    with (second.zip.folder / "latents.zip").open("r+b") as file:  # torn, and so not in the journal
        file.seek(3 * second.zip._stride)
        file.write(b"torn" * 100)
    monkeypatch.setattr(latent_zip, "PATIENCE", 0.0)
    with pytest.raises(DatasetError, match="another process is writing"):
        EncodeJob(open_dataset(images, xflip=True), vae, "edm2", out)
    first.zip.close()
    second.zip.close()

    encoded = []
    job = EncodeJob(open_dataset(images, xflip=True), vae, "edm2", out)
    assert job.zip.written == 4
    job.encode(encoded.append)
    assert encoded == [5, 6]
    assert job.finish() is not None
    both = torch.cat([case["mean_std"], vae.encode(case["pixels_u8"].flip(-1), "edm2")])
    torch.testing.assert_close(torch.from_numpy(np.stack(read_as_official(out)[1])), both, rtol=0, atol=1e-5)


def test_one_of_several_processes_completes_the_zip_once(
    images: Path, vae: Vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the declared statistics, which the measured ones of the first images are near to."""
    monkeypatch.setattr(module, "CHUNK", 1)
    monkeypatch.setattr(module, "MEASURED", 2)
    monkeypatch.setattr(vae, "statistics", {"scm": ChannelStatistics([0.0] * 4, [2.0] * 4)}.__getitem__)
    chunks = iter(torch.cat([torch.full((1, 4, 8, 8), mean), torch.full((1, 4, 8, 8), 2.0)], 1) for mean in (1, 0, 99))
    monkeypatch.setattr(vae, "encode", lambda pixels, range: next(chunks))
    out = tmp_path / "latents.zip"
    first, second = (EncodeJob(open_dataset(images), vae, "scm", out, rank, 2) for rank in range(2))
    assert encode(second) is None
    measured = encode(first)
    assert measured is not None
    assert (measured.mean, measured.std) == (pytest.approx([0.5] * 4), pytest.approx([4.25**0.5] * 4))
    written = out.read_bytes()
    assert second.finish() is None  # the folder is gone
    monkeypatch.setattr(second.zip, "alone", nullcontext)
    assert second.finish() is None  # it had opened the lock, and waited for it
    second.zip.close()
    assert out.read_bytes() == written
    encoding = open_dataset(out).encoding
    assert encoding is not None
    assert (list(encoding.raw_mean), list(encoding.raw_std)) == ([0] * 4, [2] * 4)
    with zipfile.ZipFile(out) as archive:
        record = json.loads(archive.read("dataset.json"))["encoder"]
    assert (record["measured"]["images"], record["source"]["name"]) == (2, "images")


def test_progress_is_told_by_the_batch(images: Path, vae: Vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the chunk, which takes minutes on a CPU; what is told last of a chunk is on the disk."""
    monkeypatch.setattr(vae, "batch", 1)
    monkeypatch.setattr(module, "CHUNK", 4)
    job = EncodeJob(open_dataset(images, xflip=True), vae, "edm2", tmp_path / "latents.zip")
    told = []
    job.encode(lambda encoded: told.append((encoded, job.zip.written)))
    assert told == [(1, 0), (2, 0), (3, 0), (4, 4), (5, 4), (6, 6)]


def test_a_kill_while_the_directory_is_written(images: Path, vae: Vae, tmp_path: Path) -> None:
    out = tmp_path / "latents.zip"
    job = EncodeJob(open_dataset(images), vae, "edm2", out)
    job.encode()
    with (job.zip.folder / "latents.zip").open("ab") as file:
        file.write(b"PK\1\2 half a directory")
    job.zip.close()
    again = EncodeJob(open_dataset(images), vae, "edm2", out)
    assert encode(again) is not None
    assert read_as_official(out)[2] == [2, 1, 0]


def test_the_same_again_and_another_one(images: Path, vae: Vae, tmp_path: Path) -> None:
    out = tmp_path / "latents.zip"
    encode(EncodeJob(open_dataset(images), vae, "edm2", out))
    written = out.read_bytes()
    assert EncodeJob(open_dataset(images), vae, "edm2", out).zip.finished
    with pytest.raises(DatasetError, match="exists and holds something else"):
        EncodeJob(open_dataset(images), vae, "scm", out)
    assert out.read_bytes() == written
    other = tmp_path / "other.zip"
    unfinished = EncodeJob(open_dataset(images), vae, "edm2", other)
    unfinished.encode()
    unfinished.zip.close()
    with pytest.raises(DatasetError, match=r"was begun with other range: .* --overwrite"):
        EncodeJob(open_dataset(images), vae, "scm", other)
    for path in (out, other):
        replacing = EncodeJob(open_dataset(images), vae, "scm", path, overwrite=True)
        assert path is other or out.read_bytes() == written  # until the new one is complete
        encode(replacing)
        encoding = open_dataset(path).encoding
        assert encoding is not None
        assert encoding.range == "scm"
    assert other.read_bytes() == out.read_bytes()  # of what was done before nothing is left


def test_what_decides_the_latents_is_not_mixed(images: Path, vae: Vae, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "a.zip"
    data, mirrored = open_dataset(images), open_dataset(images, xflip=True)
    EncodeJob(data, vae, "edm2", out).zip.close()
    document = json.loads((images / "dataset.json").read_text())
    document["labels"][0][1] = 0
    (images / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(DatasetError, match="was begun with other images: "):
        EncodeJob(open_dataset(images), vae, "edm2", out)
    with pytest.raises(DatasetError, match="was begun with other xflip: "):
        EncodeJob(mirrored, vae, "edm2", out)
    for owner, name, value, key in ((vae, "sha256", "0" * 64, "vae_sha256"), (vae.model, "dtype", "half", "dtype")):
        with monkeypatch.context() as patched:
            patched.setattr(type(owner) if name == "dtype" else owner, name, value)
            with pytest.raises(DatasetError, match=f"was begun with other {key}: "):
                EncodeJob(data, vae, "edm2", out)


def test_what_is_refused(images: Path, vae: Vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((3, 12, 12), np.uint8)
    with pytest.raises(DatasetError, match=r"images of 12x12, .* --resolution that is a multiple of 8"):
        EncodeJob(Dataset("set", "train", ["0"], lambda i: pixels), vae, "edm2", tmp_path / "a.zip")
    encode(EncodeJob(open_dataset(images), vae, "edm2", tmp_path / "b.zip"))
    with pytest.raises(DatasetError, match="holds latents already"):
        EncodeJob(open_dataset(tmp_path / "b.zip"), vae, "edm2", tmp_path / "a.zip")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DatasetError, match=r"a.zip will take 0.0 GB, but its disk has 0.0 GB free"):
        EncodeJob(open_dataset(images), vae, "edm2", tmp_path / "a.zip")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(
    value: float, images: Path, vae: Vae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of image 4, which is the second mirrored; those before it stay."""
    monkeypatch.setattr(module, "CHUNK", 2)
    batches = iter([torch.ones(2, 8, 8, 8), torch.ones(2, 8, 8, 8), torch.full((2, 8, 8, 8), value)])
    monkeypatch.setattr(vae, "encode", lambda pixels, range: next(batches))
    job = EncodeJob(open_dataset(images, xflip=True), vae, "edm2", tmp_path / "a.zip")
    with pytest.raises(DatasetError, match=r"1\.png has latents that are not finite"):
        job.encode()
    assert job.zip.written == 4
    job.zip.close()


def test_statistics_that_are_far_off() -> None:
    declared = STABLE_DIFFUSION["edm2"]
    near = ChannelStatistics(
        [mean + 0.3 * std for mean, std in zip(*declared, strict=True)], [1.2 * std for std in declared.std]
    )
    assert not far_off(near, declared)
    assert far_off(STABLE_DIFFUSION["scm"], declared)
    for shift, factor, far in ((0.6, 1, True), (-0.6, 1, True), (-0.4, 1, False), (0, 1.6, True), (0, 1 / 1.6, True)):
        mean, std = declared.mean[3] + shift * declared.std[3], factor * declared.std[3]
        found = ChannelStatistics([*declared.mean[:3], mean], [*declared.std[:3], std])
        assert far_off(found, declared) == far
    assert len(compare_statistics(near, declared, 5000)) == 2
    lines = compare_statistics(ChannelStatistics([0] * 4, [1] * 4), declared, 5000)
    assert lines[0].startswith("Latents of the first 1,000 images, by channel: mean 0, 0, 0, 0; std 1, 1, 1, 1")
    assert lines[1] == "Declared for this VAE: mean 5.81, 3.25, 0.12, -2.15; std 4.17, 4.62, 3.71, 3.28."
    assert "They differ much" in lines[2]


def test_a_record_that_is_none(images: Path, tmp_path: Path, vae: Vae) -> None:
    encode(EncodeJob(open_dataset(images), vae, "edm2", tmp_path / "a.zip"))
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(folder)
    path = folder / "dataset.json"
    document = json.loads(path.read_text())
    for encoder, message in [
        ({"vae_name": "x"}, "range"),
        ({**document["encoder"], "range": "tv"}, "Invalid enum value"),
    ]:
        path.write_text(json.dumps(document | {"encoder": encoder}))
        with pytest.raises(DatasetError, match=f"encoder does not say how latents were made .*{message}"):
            open_dataset(folder)
    path.write_text(json.dumps(document | {"encoder": document["encoder"] | {"raw_mean": [0.0], "raw_std": [1.0]}}))
    with pytest.raises(DatasetError, match=r"latents of 4 channels, .* statistics of 1"):
        open_dataset(folder)
    path.write_text(json.dumps({"labels": document["labels"]}))  # NVIDIA's tool records nothing
    encoding = open_dataset(folder).encoding
    assert isinstance(encoding, Encoding)
    assert (encoding.range, encoding.vae_sha256) == ("edm2", None)
