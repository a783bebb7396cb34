"""What metrics compare with: data sets and statistics of them, read once; and the pictures of latents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_files import TINY_DINOV2
from PIL import Image
from torch import Tensor

from edmdistill.checkpoints.load import load_denoiser
from edmdistill.data.datasets import open_dataset
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation import panel
from edmdistill.evaluation.collect import collect_statistics, write_statistics
from edmdistill.evaluation.compare import Row, compare
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.frechet import frechet_distance, statistics
from edmdistill.evaluation.shards import Work
from edmdistill.features.spaces import FEATURE_SPACES, Pixels, load_features
from edmdistill.sampling.decode import LatentDecoder, open_decoder
from edmdistill.sampling.generate import sample
from edmdistill.sampling.spec import SamplerSpec


class Stand(Pixels):
    """Pixels in the place of Inception, whose weights are not here."""

    name = "inception"


@pytest.fixture
def inception(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(FEATURE_SPACES, "inception", Stand)
    panel._load_space.cache_clear()
    yield
    panel._load_space.cache_clear()


def pixels(seed: int, count: int = 40) -> Tensor:
    """uint8 [N,3,4,4]"""
    return torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write_reference(path: Path, real: Tensor, **arrays: Any) -> Path:
    mean, covariance, _ = statistics(Pixels()(real))
    np.savez(path, mu=mean.numpy(), sigma=covariance.numpy(), **arrays)
    return path


@pytest.mark.usefixtures("inception")
def test_adms_reference_gives_its_statistics_and_its_images(tmp_path: Path) -> None:
    ours, stated, pictured = (pixels(seed) for seed in range(3))
    file = write_reference(
        tmp_path / "adm.npz",
        stated,
        arr_0=pictured.permute(0, 2, 3, 1).numpy(),
        mu_s=np.zeros(4),
        sigma_s=np.eye(4),
    )
    names = ["fid", "precision_inception", "recall_inception"]
    result = evaluate(ours, file, protocol="adm", metrics=names)
    assert result.metrics["fid@40"] == pytest.approx(
        frechet_distance(statistics(Pixels()(ours)), statistics(Pixels()(stated))), rel=1e-10
    )
    folder = write_pictures(tmp_path / "pictures", pictured)
    apart = evaluate(ours, folder, protocol="adm", metrics=names[1:])
    for name, value in apart.metrics.items():
        assert result.metrics[name] == value


@pytest.mark.usefixtures("inception")
@pytest.mark.parametrize("name", ["arr_0", "images"])
def test_images_in_an_npz_are_a_reference(tmp_path: Path, name: str) -> None:
    """ADM's evaluator reads such a reference batch; its numbers are those of the same images in a data set."""
    ours, pictured = pixels(0), pixels(1)
    np.savez(tmp_path / "real.npz", **{name: pictured.permute(0, 2, 3, 1).numpy()})
    folder = write_pictures(tmp_path / "pictures", pictured)
    results = [
        evaluate(ours, source, protocol="adm", metrics=["fid", "precision"])
        for source in (tmp_path / "real.npz", folder)
    ]
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=1e-9)
    compare([Row("file", results[0]), Row("folder", results[1])])
    with pytest.raises(DatasetError, match=r"images are 3x2x2, but those of the reference .*real\.npz are 3x4x4"):
        evaluate(ours[:, :, :2, :2], tmp_path / "real.npz", protocol="adm")


def write_pictures(folder: Path, pictures: Tensor) -> Path:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    return folder


@pytest.mark.usefixtures("inception")
def test_images_of_adms_reference_serve_other_spaces(tmp_path: Path) -> None:
    ours, pictured = pixels(0), pixels(2, 30)
    file = write_reference(tmp_path / "adm.npz", pixels(1), arr_0=pictured.permute(0, 2, 3, 1).numpy())
    result = evaluate(ours, file, protocol="adm", metrics=["fid", "fd_pixels"])
    apart = evaluate(ours, write_pictures(tmp_path / "pictures", pictured), protocol="adm", metrics=["fd_pixels"])
    assert result.metrics["fd_pixels@40"] == pytest.approx(apart.metrics["fd_pixels@40"], rel=1e-9)
    assert result.protocol.reference is not None
    assert result.protocol.reference.kept == 30


@pytest.mark.usefixtures("inception")
def test_statistics_alone_do_not_serve_metrics_of_single_images(tmp_path: Path) -> None:
    file = write_reference(tmp_path / "edm.npz", pixels(0))
    result = evaluate(pixels(1), file, protocol="edm")
    assert result.protocol.reference is not None
    assert (result.protocol.reference.source, result.protocol.reference.n) == ("edm.npz", None)
    ours, work = write_pictures(tmp_path / "ours", pixels(1)), Work(tmp_path / "work")
    with pytest.raises(
        EdmDistillError, match=r"edm\.npz has no features of single images, .*: give the images"
    ) as said:
        evaluate(ours, file, protocol="edm", metrics=["fid", "precision"], work=work)
    assert "\n" not in str(said.value)
    assert not work.abandoned()
    assert not work.root.exists()  # as `doctor` would call it unfinished, though no command can finish it


def test_statistics_of_data_stats_give_the_number_of_the_data(tmp_path: Path) -> None:
    data, images = open_dataset("digits"), open_dataset("digits", split="test").images(range(60))
    write_statistics(tmp_path / "digits.npz", *collect_statistics(data, {"digits": load_features("digits")}))
    file, direct = (evaluate(images, source, protocol="digits") for source in (tmp_path / "digits.npz", data))
    assert file.metrics == pytest.approx(direct.metrics, rel=1e-6)
    assert file.protocol == direct.protocol
    compare([Row("file", file), Row("direct", direct)])


def test_latents_are_decoded(golden: Path, tmp_path: Path) -> None:
    model, seeds = load_denoiser(golden / "edm2-latent-cond.pkl"), range(4)
    decode = open_decoder(model.encoder, str(golden / "evaluation/latents/tiny-vae"))
    assert isinstance(decode, LatentDecoder)
    spec = SamplerSpec(nfe=1)
    drawn = decode(sample(model, 1, seeds=seeds))
    for i, picture in enumerate(drawn.flip(0)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    options: dict[str, Any] = {"metrics": ["fd_dinov2"], "weights": {"dinov2": TINY_DINOV2}}
    result = evaluate(model, tmp_path, protocol="edm2", sampler=spec, seeds=seeds, decode=decode, **options)
    space = load_features("dinov2", TINY_DINOV2)
    assert list(result.metrics) == [f"fd_dinov2[{str(space.sha256)[:8]}]@4"]
    # The reference are the same pictures, which only the classes and seeds that the protocol draws can give.
    assert abs(next(iter(result.metrics.values()))) < 1e-6
    assert result.protocol.decoder == decode.vae.sha256
    assert result.protocol.labels == "drawn"
    with pytest.raises(EdmDistillError, match="this network makes latents"):
        evaluate(model, tmp_path, protocol="edm2", sampler=spec, seeds=seeds, **options)


def test_latents_are_no_reference(tmp_path: Path) -> None:
    for i in range(2):
        np.save(tmp_path / f"img-mean-std-{i:08}.npy", np.ones((8, 4, 4), np.float32))
    with pytest.raises(DatasetError, match="holds latents, but pixels are needed; give the images they were made from"):
        evaluate(pixels(0), tmp_path, protocol="pixels")
