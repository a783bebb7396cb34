"""Statistics of a data set, and that measuring against them is measuring against the set."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from ranks import Rank, in_ranks

from edmdistill.data.datasets import open_dataset
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation.collect import collect_statistics, write_statistics
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.evaluation.feature_set import Features
from edmdistill.evaluation.frechet import RunningStatistics
from edmdistill.evaluation.images import block_size
from edmdistill.evaluation.references import About, SpaceStatistics, open_statistics
from edmdistill.evaluation.shards import Work
from edmdistill.features.base import FeatureSpace
from edmdistill.features.spaces import Pixels, load_features

SPACES: dict[str, FeatureSpace] = {"digits": load_features("digits"), "pixels": Pixels()}
TEST = open_dataset("digits", split="test")


def collect(**options: Any) -> tuple[About, dict[str, SpaceStatistics]]:
    collected = collect_statistics(TEST, SPACES, **options)
    assert collected is not None
    return collected


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "stats.npz"
    write_statistics(path, *collect(keep=50))
    return path


def test_what_is_read_is_what_was_collected(file: Path) -> None:
    found = open_statistics(file)
    assert (found.layout, found.n, list(found.spaces)) == ("edmdistill", len(TEST), ["digits", "pixels"])
    assert found.about is not None
    assert (found.about.source, found.about.split) == ("digits", "test")
    assert found.about.fingerprint == TEST.fingerprint
    for space in SPACES.values():
        features = space(TEST.images(range(len(TEST))))
        gaussian = found.collected(space, RunningStatistics)
        np.testing.assert_allclose(gaussian.mean, features.double().mean(0), atol=1e-6)
        np.testing.assert_allclose(gaussian.covariance, np.cov(features.double(), rowvar=False), atol=1e-6)
        assert gaussian.n == len(TEST)


def test_kept_features_are_of_the_same_images_in_all_spaces(file: Path) -> None:
    found = open_statistics(file)
    pixels = found.collected(SPACES["pixels"], Features).values
    assert len(pixels) == 50
    everything = SPACES["pixels"](TEST.images(range(len(TEST))))
    rows = [int((everything == row).all(1).nonzero()[0]) for row in pixels]
    assert rows == sorted(set(rows))
    digits = SPACES["digits"](TEST.images(rows))
    torch.testing.assert_close(found.collected(SPACES["digits"], Features).values, digits)


def test_any_number_kept(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    write_statistics(path, *collect(keep=10**6))
    first, second = open_statistics(file), open_statistics(path)
    assert first.about == second.about
    for name, space in SPACES.items():
        a, b = first.spaces[name].gaussian, second.spaces[name].gaussian
        np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-9, atol=1e-6)
        assert len(second.collected(space, Features)) == len(TEST)


def test_two_processes_collect_what_one_does(tmp_path: Path) -> None:
    def act(rank: Rank) -> Any:
        return collect_statistics(TEST, SPACES, keep=9, work=Work(tmp_path), processes=rank)

    (about, spaces), nothing = in_ranks(2, act)
    assert nothing is None
    expected, alone = collect(keep=9)
    assert about == expected
    for name in SPACES:
        torch.testing.assert_close(spaces[name].gaussian.covariance, alone[name].gaussian.covariance)
        torch.testing.assert_close(spaces[name].features.values, alone[name].features.values)


def test_a_stopped_command_goes_on(tmp_path: Path) -> None:
    def stop(count: int) -> None:
        if count:
            raise KeyboardInterrupt

    with closing(Work(tmp_path)) as work, pytest.raises(KeyboardInterrupt):
        collect(work=work, on_progress=stop)
    steps: list[int] = []
    about, _ = collect(work=Work(tmp_path), on_progress=steps.append)
    assert (about.n, steps[0], sum(steps)) == (len(TEST), block_size(8), len(TEST))  # a block is there already


def test_measuring_against_statistics_is_measuring_against_the_set(tmp_path: Path) -> None:
    images = open_dataset("digits").images(range(60))
    metrics = ["fd_pixels", "precision_pixels", "recall_pixels", "density_pixels", "coverage_pixels", "kd_pixels"]
    write_statistics(tmp_path / "stats.npz", *collect(keep=len(TEST)))
    results = [
        evaluate(images, reference, protocol="pixels", metrics=metrics) for reference in (TEST, tmp_path / "stats.npz")
    ]
    a, b = (result.metrics for result in results)
    assert list(a) == [f"{name}@60" for name in metrics]
    assert a == pytest.approx(b, rel=1e-9)
    assert results[0].protocol == results[1].protocol


def test_results_that_compare_with_fewer_images_say_so(file: Path) -> None:
    images = open_dataset("digits").images(range(60))
    fd, precision = (evaluate(images, file, protocol="pixels", metrics=[name]) for name in ("fd", "precision"))
    assert fd.protocol.reference is not None
    assert precision.protocol.reference == replace(fd.protocol.reference, kept=50)


def test_other_weights_are_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "digits.safetensors"
    other.write_bytes(EMBEDDED["digits"].features.read_bytes())
    space = load_features("digits", other)
    assert open_statistics(file).collected(space, RunningStatistics).n == len(TEST)
    space.sha256 = "0" * 64
    with pytest.raises(
        EdmDistillError, match=r"was made with other weights of digits \(.{8}\) than these \(00000000\)"
    ):
        open_statistics(file).collected(space, RunningStatistics)


def test_the_file_holds_no_pickle(file: Path) -> None:
    with np.load(file, allow_pickle=False) as arrays:
        assert sorted(arrays) == sorted(
            ["about", *(f"{kind}_{name}" for kind in ("mu", "sigma", "features") for name in SPACES)]
        )


def test_one_image_is_too_few(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(DatasetError, match="has 1 image, and a covariance needs two: give more"):
        collect_statistics(open_dataset(tmp_path), SPACES)
