"""Reference files: every layout, the official distances between them, and what is refused."""

import io
import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edmdistill.atomic import sha256_file
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation import references
from edmdistill.evaluation.base import Nothing
from edmdistill.evaluation.feature_set import Features
from edmdistill.evaluation.frechet import RunningStatistics, frechet_distance
from edmdistill.evaluation.protocol import PROTOCOLS, open_reference
from edmdistill.evaluation.references import is_statistics, open_statistics
from edmdistill.features.base import FeatureSpace

D = 3
MU, SIGMA = np.arange(D, dtype=np.float64), np.diag(np.arange(1.0, D + 1))


class Space(FeatureSpace):
    """A stand-in for Inception of some dimension."""

    def __init__(self, name: str = "inception", dim: int | None = None) -> None:
        self.name, self.dim = name, dim

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        raise NotImplementedError


@pytest.fixture
def metrics(golden: Path) -> Path:
    return golden / "evaluation" / "metrics"


def test_official_distances(metrics: Path) -> None:
    expected = json.loads((metrics / "expected.json").read_text())["values"]
    real, made = (open_statistics(metrics / f"ref-{name}.pkl").spaces for name in ("real", "made"))
    for metric, space in (("fid", "inception"), ("fd_dinov2", "dinov2")):
        found = frechet_distance(made[space].gaussian, real[space].gaussian)
        assert found == pytest.approx(expected["real-made"][metric], rel=1e-9)
        assert frechet_distance(real[space].gaussian, real[space].gaussian) == pytest.approx(0, abs=1e-9)


def test_layouts(metrics: Path) -> None:
    edm2, edm, adm = (open_statistics(metrics / name) for name in ("ref-real.pkl", "edm-ref.npz", "adm-ref.npz"))
    assert [file.layout for file in (edm2, edm, adm)] == ["edm2", "edm", "adm"]
    assert [file.n for file in (edm2, edm, adm)] == [900, None, None]
    assert [file.has_images for file in (edm2, edm, adm)] == [False, False, True]
    for file in (edm, adm):
        gaussian = file.collected(Space(dim=48), RunningStatistics)
        assert frechet_distance(gaussian, edm2.collected(Space(dim=48), RunningStatistics)) == pytest.approx(
            0, abs=1e-9
        )
    assert edm.collected(Space(), Nothing) is None
    official = Space()
    official.sha256 = "a" * 64  # of which official files say nothing
    assert edm.collected(official, RunningStatistics) is edm.spaces["inception"].gaussian


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    for arrays, known in (
        ({"arr_0": images}, ("images", 2, True)),
        ({"arr_0": images, "mu": MU, "sigma": SIGMA}, ("adm", None, True)),
        ({"mu_s": MU, "sigma_s": SIGMA, "mu": MU, "sigma": SIGMA}, ("adm", None, False)),
        ({"mu": MU, "sigma": SIGMA}, ("edm", None, False)),
        (OWN, ("edmdistill", 5, False)),
    ):
        np.savez(tmp_path / "ref.npz", **arrays)
        file = open_statistics(tmp_path / "ref.npz")
        assert (file.layout, file.n, file.has_images) == known
        assert file.sha256 == ("pixels" if arrays is OWN else sha256_file(tmp_path / "ref.npz"))
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps({"num_images": "5", "fid": {"mu": MU, "sigma": SIGMA}}, 4))
    assert open_statistics(tmp_path / "ref.pkl").n is None


def test_what_a_file_does_not_have(metrics: Path) -> None:
    file = open_statistics(metrics / "edm-ref.npz")
    with pytest.raises(EdmDistillError, match="no statistics of the feature space dinov2, only of inception: give the"):
        file.collected(Space("dinov2"), RunningStatistics)
    with pytest.raises(EdmDistillError, match="statistics of 48 features of inception, but these weights have 2048"):
        file.collected(Space(dim=2048), RunningStatistics)
    with pytest.raises(EdmDistillError, match=r"no features of single images.* --features inception --keep-features 1"):
        file.collected(Space(dim=48), Features)


def test_what_is_statistics(metrics: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    shutil.copy(tmp_path / "images.npz", tmp_path / "IMAGES.NPZ")
    names = [*metrics.glob("*ref*"), tmp_path / "images.npz", tmp_path / "IMAGES.NPZ", tmp_path / "REF.PKL"]
    assert all(map(is_statistics, names))
    (tmp_path / "folder.npz").mkdir()
    assert not any(map(is_statistics, [tmp_path / name for name in ("folder.npz", "set.zip", "")]))


def test_an_npz_of_other_arrays_is_told_which_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(2))
    with pytest.raises(DatasetError, match=r"holds x, but mu and sigma were expected; give .* or images in an \.npz"):
        open_reference(tmp_path / "other.npz", PROTOCOLS["pixels"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    """EDM2's tool writes its Python's default, which is 5 from Python 3.14 on; 2 holds arrays as text."""
    file = tmp_path / "ref.pkl"
    file.write_bytes(pickle.dumps({"num_images": 5, "fid": {"mu": MU, "sigma": SIGMA}}, protocol))
    if protocol == 2:
        with pytest.raises(DatasetError):
            open_statistics(file)
        return
    found = open_statistics(file).spaces["inception"].gaussian
    np.testing.assert_array_equal(found.mean, MU)
    np.testing.assert_array_equal(found.covariance, SIGMA)
    assert found.n == 5


@pytest.mark.parametrize("images", [50, 12])
def test_float32_statistics_are_read(tmp_path: Path, images: int) -> None:
    x = np.random.default_rng(0).standard_normal((images, 100)).astype(np.float32)
    np.savez(tmp_path / "ref.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False).astype(np.float32))
    assert open_statistics(tmp_path / "ref.npz").spaces["inception"].gaussian.covariance.dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_rounding_is_relative(scale: float, tmp_path: Path) -> None:
    """What is symmetric but for it is read as symmetric, whatever the features' scale."""
    nearly = scale * (SIGMA + np.triu(np.full((D, D), 1e-6)))
    np.savez(tmp_path / "ref.npz", mu=MU, sigma=nearly)
    covariance = open_statistics(tmp_path / "ref.npz").spaces["inception"].gaussian.covariance
    np.testing.assert_array_equal(covariance, (nearly + nearly.T) / 2)
    np.savez(tmp_path / "ref.npz", mu=MU, sigma=scale * (SIGMA + np.triu(np.full((D, D), 1e-2))))
    with pytest.raises(DatasetError, match="sigma is not symmetric"):
        open_statistics(tmp_path / "ref.npz")


def test_too_many_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "MAX_DIM", D - 1)
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}}, 4))
    with pytest.raises(DatasetError, match=r"mu \[3\] and sigma \[3, 3\] are not \[d\] and \[d,d\], d at most 2"):
        open_statistics(tmp_path / "ref.pkl")


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def claiming(shape: tuple[int, ...], compressed: int = zipfile.ZIP_STORED) -> bytes:
    """An .npz whose mu claims to be large."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compressed) as archive:
        archive.writestr("mu.npy", header.getvalue() + bytes(2**20))
        archive.writestr("sigma.npy", header.getvalue())
    return file.getvalue()


def changed(values: np.ndarray, index: Any, value: float) -> np.ndarray:
    values = values.copy()
    values[index] = value
    return values


def pickled(**entries: object) -> bytes:
    return pickle.dumps({"num_images": 5, **entries})


def twice() -> bytes:
    """An .npz with two arrays of one name, as zip files can hold."""
    content = bytearray(npz(mu=MU, no=MU, sigma=SIGMA))
    return bytes(content).replace(b"no.npy", b"mu.npy")


ABOUT = json.dumps(
    {"n": 5, "weights": {"pixels": None}, "sha256": "pixels"}
    | dict.fromkeys(("source", "split", "fingerprint", "version"), "")
)
OWN = {"about": ABOUT, "mu_pixels": MU, "sigma_pixels": SIGMA}


BAD: Mapping[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "an empty file; give"),
    "web page": (lambda: b"<html>", "neither an .npz nor a pickle; give"),
    "cut": (lambda: npz(mu=MU, sigma=SIGMA)[:200], "not a whole zip"),
    "no images": (lambda: npz(arr_0=np.zeros((2, 3))), r"images are float64 \[2, 3\], but uint8"),
    "images without sigma": (lambda: npz(mu=MU, arr_0=np.zeros((2, 4, 4, 3), np.uint8)), "but mu and sigma were"),
    "images without mu": (lambda: npz(sigma=SIGMA, arr_0=np.zeros((2, 4, 4, 3), np.uint8)), "but mu and sigma were"),
    "no sigma": (lambda: npz(mu=MU), "holds mu, but mu and sigma were expected"),
    "nothing": (lambda: npz(), "holds nothing, but mu"),
    "sizes": (lambda: npz(mu=MU, sigma=SIGMA[:2]), r"mu \[3\] and sigma \[2, 3\] are not \[d\] and \[d,d\]"),
    "scalar": (lambda: npz(mu=np.float64(1), sigma=np.float64(1)), r"mu \[\] and sigma \[\] are not"),
    "no features": (lambda: npz(mu=MU[:0], sigma=SIGMA[:0, :0]), r"mu \[0\] and sigma \[0, 0\] are not"),
    "integers": (lambda: npz(mu=MU.astype(int), sigma=SIGMA), "mu and sigma are int64 and float64, not floating-point"),
    "complex": (lambda: npz(mu=MU, sigma=SIGMA + 0j), "complex128, not floating-point"),
    "nan mu": (lambda: npz(mu=changed(MU, 1, np.nan), sigma=SIGMA), "mu holds NaN or infinity"),
    "infinite": (lambda: npz(mu=MU, sigma=changed(SIGMA, (0, 0), np.inf)), "sigma holds NaN or infinity"),
    "not symmetric": (lambda: npz(mu=MU, sigma=changed(SIGMA, (0, 1), 0.5)), "sigma is not symmetric"),
    "negative": (lambda: npz(mu=MU, sigma=changed(SIGMA, (0, 0), -1)), "sigma has a negative variance"),
    "indefinite": (lambda: npz(mu=MU[:2], sigma=np.array([[1.0, 2], [2, 1]])), "sigma has a negative variance"),
    "8 TiB": (lambda: claiming((2**40,)), "claims 8,796,093,022,208 bytes"),
    "8 TiB packed": (lambda: claiming((2**20, 2**20), zipfile.ZIP_DEFLATED), "claims 8,796,093,022,208 bytes"),
    "a large array": (lambda: claiming((2**16,)), "has 65,536 entries, and at most 8,192 are read"),
    "twice": (twice, "holds mu twice; write it again"),
    "features": (lambda: npz(**OWN, features_pixels=MU * np.nan), "not of 3 finite numbers; make the statistics again"),
    "size of features": (
        lambda: npz(**OWN, features_pixels=np.zeros((2, 4))),
        r"\[2, 4\] are not of 3 finite",
    ),
    "own mu": (lambda: npz(about=ABOUT, sigma_pixels=SIGMA), "mu_pixels is missing; write the file again"),
    "about is no JSON": (lambda: npz(about="{"), "about cannot be read"),
    "about is a number": (lambda: npz(about=np.arange(2)), "about cannot be read"),
    "pickle of nothing": (lambda: pickle.dumps([1]), "neither fid nor fd_dinov2 with mu and sigma"),
    "pickle without numbers": (lambda: pickled(fid={"mu": 1, "sigma": 2}), "neither fid nor fd_dinov2"),
    "pickle not symmetric": (lambda: pickled(fid={"mu": MU, "sigma": SIGMA + MU}), "fid: sigma is not symmetric"),
    "pickle with objects": (
        lambda: pickled(fid={"mu": np.array([{}]), "sigma": SIGMA}),
        "damaged, or no official pickle",
    ),
    "pickle cut": (lambda: pickled(fid={"mu": MU, "sigma": SIGMA})[:-60], "ends too early"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_references_are_refused(tmp_path: Path, case: str) -> None:
    content, why = BAD[case]
    (tmp_path / "ref").write_bytes(content())
    with pytest.raises(DatasetError, match=why) as error:
        open_statistics(tmp_path / "ref")
    assert str(error.value).startswith(str(tmp_path / "ref"))
    assert "\n" not in str(error.value)


def test_hostile_references_are_not_executed(metrics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="Object arrays cannot be read: they are pickles"):
        open_statistics(metrics / "bad-ref-object.npz")
    with pytest.raises(DatasetError, match=re.escape("asks for 'posix.system', which no official file does")):
        open_statistics(metrics / "bad-ref-reduce.pkl")
    assert not list(tmp_path.iterdir())


def test_a_network_is_not_statistics(golden: Path) -> None:
    with pytest.raises(DatasetError, match=r"edm-tiny-cond.pkl is a network, not statistics of images"):
        open_statistics(golden / "edm-tiny-cond.pkl")


@pytest.mark.parametrize("name", ["", "there/is/none.npz"])
def test_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is a folder|does not exist"):
        open_statistics(tmp_path / name)
