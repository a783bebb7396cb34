"""Power-function averages: the official numbers, and averages that are put together from others."""

import gzip
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_generator import tiny_generator
from tolerance import assert_rounded
from torch import Tensor

from edmdistill.checkpoints import posthoc_ema as module
from edmdistill.checkpoints.config import Provenance
from edmdistill.checkpoints.layout import MODEL
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.checkpoints.posthoc_ema import (
    MAX_SIGMA_REL,
    Profile,
    coefficients,
    find_snapshots,
    gamma_to_sigma_rel,
    inner_products,
    kimg_to_images,
    misfits,
    power_function_beta,
    reconstruct,
    reconstruct_checkpoint,
    save_snapshot,
    sigma_rel_to_gamma,
)
from edmdistill.checkpoints.store import load_checkpoint, load_tensors
from edmdistill.cli import main
from edmdistill.errors import CheckpointError

LENGTHS = ("0.050", "0.100")


@pytest.fixture(scope="session")
def extras(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / "edm2-extras.json").read_text())
    return found


@pytest.fixture(scope="session")
def snapshots(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with phema-in/, snapshots of the official trainer, and what the official code made of them."""
    folder = tmp_path_factory.mktemp("phema")
    with tarfile.open(golden / "phema.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


# The official numbers.


def test_lengths_and_exponents(extras: dict[str, Any]) -> None:
    there, back = extras["std_to_exp"], extras["exp_to_std"]
    assert list(map(sigma_rel_to_gamma, there["std"])) == pytest.approx(there["exp"], rel=1e-12)
    assert list(map(gamma_to_sigma_rel, back["exp"])) == pytest.approx(back["std"], rel=1e-14)


def test_betas(extras: dict[str, Any]) -> None:
    for case in extras["power_function_beta"]:
        gamma = sigma_rel_to_gamma(case["std"])
        beta = power_function_beta(case["t_next"] - case["t_delta"], case["t_delta"], gamma)
        assert beta == pytest.approx(case["beta"], rel=1e-12)


def test_correlations(extras: dict[str, Any]) -> None:
    for case in extras["power_function_correlation"]:
        a, b = Profile(case["a_ofs"], case["a_std"]), Profile(case["b_ofs"], case["b_std"])
        assert inner_products([a], [b]).item() == pytest.approx(case["value"], rel=1e-12)


def test_densities(extras: dict[str, Any]) -> None:
    """At t = 0, 1, 2 ..., over their sum."""
    for case in extras["power_function_response"]:
        t = np.arange(case["len"])
        density = np.where(t <= case["ofs"], t ** Profile(case["ofs"], case["std"]).gamma, 0)
        np.testing.assert_allclose(density / density.sum(), case["resp"], rtol=1e-12)


def test_coefficients(extras: dict[str, Any]) -> None:
    for case in extras["solve_posthoc_coefficients"]:
        stored = list(map(Profile, case["in_ofs"], case["in_std"]))
        wanted = [Profile(case["out_ofs"], sigma_rel) for sigma_rel in case["out_std"]]
        np.testing.assert_allclose(coefficients(stored, wanted), case["coefs_in_by_out"], rtol=0, atol=1e-7)


def test_images_by_file_name(extras: dict[str, Any]) -> None:
    for kimg, images in extras["kimg_to_nimg"].items():
        assert kimg_to_images(int(kimg)) == images


def test_the_official_reconstruction(snapshots: Path) -> None:
    """Tensor by tensor, rounded to float16 as the official file is."""
    files = sorted((snapshots / "phema-in").iterdir())
    stored = {Profile(kimg_to_images(int(f.stem.split("-")[2])), float(f.stem.split("-")[3])): f for f in files}
    loads = {profile: (lambda file=file: read_official(file).tensors) for profile, file in stored.items()}
    found = reconstruct(loads, Profile(262144, 0.075))
    expected = read_official(snapshots / "phema-0000262-0.075.pkl").tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == torch.float16
        # Least squares are LAPACK's, which may round a number to the float16 beside it.
        assert_rounded(found[name].half(), tensor, 1)


# Properties.


@given(st.floats(0.005, MAX_SIGMA_REL - 1e-4))
def test_length_and_exponent_are_inverse(sigma_rel: float) -> None:
    assert gamma_to_sigma_rel(sigma_rel_to_gamma(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


@example([(images, sigma_rel) for images in (1, 2, 3) for sigma_rel in (0.05, 0.1)])  # by rounding, |error|^2 < 0
@given(st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.05, 0.1])), min_size=2, max_size=6, unique=True))
def test_what_is_stored_is_given_back(chosen: list[tuple[int, float]]) -> None:
    stored = [Profile(1000 * images, sigma_rel) for images, sigma_rel in chosen]
    np.testing.assert_allclose(coefficients(stored, stored), np.eye(len(stored)), rtol=0, atol=1e-6)
    assert misfits(stored, stored).max() < 1e-6


def test_the_misfit_is_that_of_the_densities() -> None:
    """By the midpoint rule over time, in 1e5 bins."""
    stored = [Profile(images, sigma_rel) for images in (5, 10) for sigma_rel in (0.05, 0.1)]
    t = (np.arange(100_000) + 0.5) / 10_000

    def density(profile: Profile) -> Any:
        T, gamma = profile.images, profile.gamma
        return np.where(t < T, (gamma + 1) / T * (t / T) ** gamma, 0)

    wanted = [Profile(10, sigma_rel) for sigma_rel in (0.02, 0.075, 0.2, 0.28)]
    made = np.stack([density(profile) for profile in stored]).T @ coefficients(stored, wanted)
    for profile, column, misfit in zip(wanted, made.T, misfits(stored, wanted), strict=True):
        off = np.linalg.norm(column - density(profile)) / np.linalg.norm(density(profile))
        assert misfit == pytest.approx(off, rel=1e-3)


@given(st.integers(1, 30), st.integers(1, 64), st.floats(0.01, 0.28))
def test_the_recursion_is_the_profile(steps: int, batch: int, sigma_rel: float) -> None:
    """The share of each step in the average is the integral of the density over that step's images."""
    gamma = sigma_rel_to_gamma(sigma_rel)
    shares = np.stack([row.numpy() for row in tracked(list(torch.eye(steps, dtype=torch.float64)), batch, sigma_rel)])
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    np.testing.assert_allclose(shares[-1], np.diff(edges), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.075, 0.2])
def test_weights_that_grow_with_time(sigma_rel: float) -> None:
    """Of w(t) = t, the average of profile (T, gamma) is T (gamma + 1) / (gamma + 2)."""

    def mean(profile: Profile) -> Tensor:
        return torch.tensor(profile.images * (profile.gamma + 1) / (profile.gamma + 2))

    profiles = [Profile(1000 * k, length) for k in range(1, 17) for length in (0.05, 0.1)]
    stored = {profile: (lambda profile=profile: {"w": mean(profile), "b": torch.ones(1)}) for profile in profiles}
    wanted = Profile(16_000, sigma_rel)
    found = reconstruct(stored, wanted)
    assert float(found["w"]) == pytest.approx(float(mean(wanted)), rel=3e-3)
    assert torch.equal(found["b"], torch.ones(1))


def tracked(weights: Sequence[Tensor], batch: int, sigma_rel: float) -> list[Tensor]:
    """The average after every step, by the recursion."""
    average, found = weights[0], []
    for step, now in enumerate(weights):
        average = average.lerp(now, 1 - power_function_beta(step * batch, batch, sigma_rel_to_gamma(sigma_rel)))
        found.append(average)
    return found


def test_another_length_after_the_fact() -> None:
    """A random walk of weights: what is put together from 16 averages is what would have been tracked, but for 1%."""
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(4096, 50, dtype=torch.float64, generator=generator).cumsum(0)
    batch = 32
    averages = {sigma_rel: tracked(list(walk), batch, sigma_rel) for sigma_rel in (0.05, 0.1)}
    stored = {
        Profile(batch * steps, sigma_rel): (lambda t=averages[sigma_rel][steps - 1]: {"w": t})
        for steps in range(512, 4097, 512)
        for sigma_rel in averages
    }
    for sigma_rel in (0.06, 0.08, 0.13):
        expected = tracked(list(walk), batch, sigma_rel)[-1]
        found = reconstruct(stored, Profile(batch * 4096, sigma_rel))["w"]
        plain = averages[0.05][-1]
        assert float((found - expected).norm()) < 0.01 * float((plain - expected).norm() + expected.norm())


# Files.


def test_official_snapshots_become_a_checkpoint(snapshots: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["ema", str(snapshots / "phema-in"), "--sigma-rel", "0.075", "--out", str(out)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "sigma_rel 0.075 after 262,144 images, from 4 averages" in result.stdout
    flow, config = load_checkpoint(out)
    assert config.ema is not None
    assert (config.stage, config.ema["images"], len(config.ema["from"])) == ("teacher", 262144, 4)
    assert config.images_seen is None  # nobody says how many the official training has seen in all
    expected, _ = build_official(read_official(snapshots / "phema-0000262-0.075.pkl"))
    own = flow.network.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.network.state_dict().items())
    assert CliRunner().invoke(main, words).exit_code == 2
    result = CliRunner().invoke(main, [*words, "--images", "131072", "--overwrite"])
    assert "after 131,072 images, from 2 averages" in result.stdout, result.output


def test_the_first_official_snapshots_are_no_averages(snapshots: Path, tmp_path: Path) -> None:
    """The official trainer writes one before the first step; in it no image weighs anything."""
    folder = shutil.copytree(snapshots / "phema-in", tmp_path / "in")
    for name in ("0000000-0.050", "0000131-0.000", "0000131-0.300"):  # and no average has such a length
        shutil.copy(folder / "network-snapshot-0000131-0.050.pkl", folder / f"network-snapshot-{name}.pkl")
    config = reconstruct_checkpoint(folder, tmp_path / "out", 0.075)
    assert config.ema is not None
    assert config.ema["from"] == [f"network-snapshot-{k}-{s}.pkl" for k in ("0000131", "0000262") for s in LENGTHS]
    assert 0 < config.ema["misfit"] < 0.06
    expected = Provenance(source="snapshots in in", licence="cc-by-nc-sa-4.0")
    assert (config.provenance, config.two_time) == (expected, True)


def test_compressed_snapshots_read_the_same(snapshots: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in (snapshots / "phema-in").iterdir():
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    (packed / "notes.pkl").touch()  # no average, by its name
    assert list(find_snapshots(packed)) == list(find_snapshots(snapshots / "phema-in"))
    for folder in (packed, snapshots / "phema-in"):
        reconstruct_checkpoint(folder, tmp_path / "out" / folder.name, 0.075)
    found, expected = (load_tensors(tmp_path / "out" / name / MODEL)[0] for name in ("packed", "phema-in"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_averages_of_a_run(tmp_path: Path) -> None:
    """One that was saved is given back, by those up to its time alone; what was measured on another is left out."""
    run, out = tmp_path / "run", tmp_path / "out"
    folder = tiny_generator(run / "generator", images_seen=3072, results=({"fid": 1.0},), ema={"half_life": 5.0})
    weights, buffers = load_tensors(folder / MODEL)[0], {"emb_fourier.freqs", "emb_fourier.phases"}
    assert weights.keys() > buffers

    def at(images: int, sigma_rel: float) -> dict[str, Tensor]:
        return {name: t if name in buffers else t * (images / 2048 + sigma_rel) for name, t in weights.items()}

    times = (1024, 2048, 3072)
    for profile in (Profile(images, sigma_rel) for images in times for sigma_rel in (0.05, 0.1)):
        save_snapshot(run / "ema", profile, at(*profile), buffers)
    saved = load_tensors(run / "ema" / f"{1024:012d}-0.050.safetensors")[0]
    assert all(t.dtype == (torch.float32 if name in buffers else torch.float16) for name, t in saved.items())
    config = reconstruct_checkpoint(run, out, 0.05, images=2048)
    assert (config.images_seen, config.results) == (2048, ())
    assert config.ema is not None
    assert (config.ema["sigma_rel"], config.ema["images"]) == (0.05, 2048)
    assert config.ema["from"] == [f"{images:012d}-{length}.safetensors" for images in times[:2] for length in LENGTHS]
    found, read = load_checkpoint(out)
    assert read == config
    for name, tensor in found.network.state_dict().items():
        expected = at(2048, 0.05)[name]
        assert torch.equal(tensor, expected) if name in buffers else torch.allclose(tensor, expected, 1e-3, 1e-5)
    assert reconstruct_checkpoint(run, out, 0.05, overwrite=True).images_seen == 3072  # the latest
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        reconstruct_checkpoint(run, out, 0.05)
    changed = at(3072, 0.1) | {"out_gain": torch.ones(1)}
    save_snapshot(run / "ema", Profile(3072, 0.1), changed, buffers)
    with pytest.raises(CheckpointError, match="belong to different networks"):
        reconstruct_checkpoint(run, out, 0.05, overwrite=True)
    assert load_checkpoint(out)[1].images_seen == 3072


def test_the_order_in_which_they_are_named_changes_nothing() -> None:
    torch.manual_seed(0)
    values = {Profile(1024 * k, length): torch.randn(1000) for k in (1, 2, 3) for length in (0.05, 0.1)}
    stored = {profile: (lambda value=value: {"w": value}) for profile, value in values.items()}
    found = (reconstruct(dict(order), Profile(3072, 0.07))["w"] for order in (stored.items(), reversed(stored.items())))
    assert torch.equal(*found)


def test_only_what_is_equal_in_all_is_kept() -> None:
    values = {Profile(1024 * k, 0.1): torch.tensor([float(k % 2), 1 / 3]).half() for k in (1, 2, 3)}
    stored = {profile: (lambda value=value: {"w": value, "b": value[1]}) for profile, value in values.items()}
    found = reconstruct(stored, Profile(3072, 0.12))
    weights = torch.from_numpy(coefficients(list(values), [Profile(3072, 0.12)])[:, 0]).float()
    torch.testing.assert_close(found["w"][0], weights[0] + weights[2])
    assert found["b"].dtype == torch.float32
    assert found["b"] == torch.tensor(1 / 3).half().float()


@pytest.mark.parametrize(
    ("sigma_rel", "images", "sentence"),
    [
        (0.3, None, "sigma_rel is 0.3, but lies between 0 and 0.2887"),
        (0.0, None, "sigma_rel is 0, but lies between"),
        (0.28, None, "do not reach sigma_rel 0.28, which they miss by 96%: ask for 0.206"),
        (0.1, 300_000, "holds no averages after 300,000 images: the nearest are after 262,144, the last after 262,144"),
        (0.1, 140_000, "holds no averages after 140,000 images: the nearest are after 131,072"),
    ],
)
def test_what_cannot_be_had(snapshots: Path, tmp_path: Path, sigma_rel: float, images: int, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        reconstruct_checkpoint(snapshots / "phema-in", tmp_path / "out", sigma_rel, images)
    assert not (tmp_path / "out").exists()


def test_what_was_found_does_not_do(snapshots: Path, golden: Path, tmp_path: Path) -> None:
    def refused(sentence: str, images: int | None = None) -> None:
        with pytest.raises(CheckpointError, match=sentence):
            reconstruct_checkpoint(folder, tmp_path / "out", 0.075, images)
        assert not (tmp_path / "out").exists()

    folder = tmp_path / "in"
    folder.mkdir()
    refused(r"holds 0 averages, but two or more are needed: .* ema\.snapshot_every")
    shutil.copy(snapshots / "phema-in" / "network-snapshot-0000131-0.050.pkl", folder)
    refused("holds 1 average, but two or more are needed")
    shutil.copy(snapshots / "phema-in" / "network-snapshot-0000262-0.050.pkl", folder)
    refused("holds 1 average up to 131,072 images", 131_072)
    shutil.copy(golden / "edm2-rgb-cond.pkl", folder / "network-snapshot-0000262-0.100.pkl")
    refused("belong to different networks: that of sigma_rel 0.1 after 262,144 images has other tensors")
    shutil.copy(snapshots / "phema-0000262-0.075.pkl", folder)
    refused("contains averages of several trainings, network-snapshot, phema")


def test_what_stands_at_out_is_looked_at_first(
    snapshots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.png").write_bytes(b"a")
    monkeypatch.setattr(module, "read_official", None)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        reconstruct_checkpoint(snapshots / "phema-in", tmp_path, 0.075)
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        reconstruct_checkpoint(snapshots / "phema-in", tiny_generator(tmp_path / "made"), 0.075)
