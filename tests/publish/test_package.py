"""What of a checkpoint is to be published, before anything is sent: its files, its picture and its licence."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from tiny_generator import tiny_generator

from edmdistill import load_generator, sample
from edmdistill.checkpoints.config import SamplingDefaults, read_config, write_config
from edmdistill.checkpoints.layout import CARD, CONFIG, MODEL
from edmdistill.errors import CheckpointError, EdmDistillError, HubError, NotFiniteError
from edmdistill.publish import hub
from edmdistill.publish.hub import GRID, STRICTNESS, build_package, choose_licence
from edmdistill.sampling.decode import open_decoder
from edmdistill.sampling.grid import to_uint8

GENERATOR = Path(__file__).parent.parent / "checkpoints" / "format-1.0"
NAME = "me/cosim-digits"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(GENERATOR, tmp_path / "generator")


@pytest.mark.parametrize(("stage", "picture"), [("generator", True), ("teacher", False)])
def test_a_picture_is_of_a_generator_with_or_without_classes(tmp_path: Path, stage: str, picture: bool) -> None:
    """A teacher, which needs many steps, has none."""
    folder = tiny_generator(tmp_path / "it", stage, label_dim=0)
    package = build_package(folder, NAME, "mit")
    assert package.files.keys() == {MODEL, CONFIG, CARD, *[GRID] * picture}
    assert (f"![Seeds 0 to 23, in 1 evaluation.]({GRID})" in package.card.decode()) is picture
    assert package.samples.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("stage", ["generator", "teacher"])
def test_a_network_whose_samples_are_not_finite_is_not_published(tmp_path: Path, stage: str) -> None:
    folder = tiny_generator(tmp_path / "it", stage, scale=1e38)
    write_config(folder, replace(read_config(folder), sampling=SamplingDefaults()))  # two steps, which overflow
    with pytest.raises(NotFiniteError, match="are not finite"):
        build_package(folder, NAME, "mit")


def test_every_sample_of_the_picture_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = torch.zeros(24, 1, 4, 4).index_fill_(0, torch.tensor([23]), torch.nan)
    monkeypatch.setattr(hub, "sample", lambda model, nfe, seeds, **more: broken[list(seeds)])
    with pytest.raises(NotFiniteError, match=r"1 of 24 images is not finite \(seeds 23\)"):
        build_package(folder, NAME)


def test_no_secrets_of_the_source_are_published(folder: Path) -> None:
    config = read_config(folder)
    source = "https://me:password@host/edm.pkl?signature=1234"
    write_config(folder, replace(config, provenance=replace(config.provenance, source=source)))
    for name, content in build_package(folder, NAME).files.items():
        text = content if isinstance(content, bytes) else content.read_bytes()
        assert not any(secret in text for secret in (b"password", b"signature")), name
        assert name in (MODEL, GRID) or b"https://host/edm.pkl" in text


def test_the_picture_of_a_latent_generator_is_decoded(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "GRID_SIZE", 2)
    encoder = {"kind": "StabilityVAEEncoder", "vae_name": "nobody/vae", "scale": [0.5] * 4, "bias": [0.0] * 4}
    folder = tiny_generator(tmp_path / "latents", channels=4, encoder=encoder)
    vae = str(golden / "evaluation/latents/tiny-vae")
    package = build_package(folder, NAME, "cc-by-nc-4.0", vae)
    picture = package.files[GRID]
    assert isinstance(picture, bytes)
    with Image.open(io.BytesIO(picture)) as image:
        found = np.asarray(image)[:, :64].astype(int)
    pixels = open_decoder(encoder, vae)(sample(load_generator(folder), 1, seeds=[0], labels=[0]))[0]
    assert np.abs(found - pixels.permute(1, 2, 0).numpy()).max() <= 1
    assert "--vae nobody/vae --out images" in package.card.decode()
    assert GRID not in build_package(folder, NAME, "cc-by-nc-4.0").files  # no VAE, no picture
    with pytest.raises(CheckpointError, match="there is no VAE nowhere"):
        build_package(folder, NAME, "cc-by-nc-4.0", "nowhere")


def test_the_picture_shows_the_classes_in_turn(folder: Path) -> None:
    picture = build_package(folder, NAME).files[GRID]
    assert isinstance(picture, bytes)
    with Image.open(io.BytesIO(picture)) as image:
        found = np.asarray(image)
    model = load_generator(folder)
    images = sample(model, 2, seeds=range(24), labels=[seed % 3 for seed in range(24)])
    pixels = to_uint8(images)[:, 0].numpy().repeat(8, 1).repeat(8, 2)
    for seed, expected in enumerate(pixels):
        top, left = seed // 8 * 34, seed % 8 * 34
        assert np.abs(found[top : top + 32, left : left + 32].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["digits", "me/a b", "me/a--b", "me/a.git", "-/-", "a/b/c", "../x", f"me/{'x' * 99}"])
def test_a_name_that_the_hub_does_not_take(folder: Path, name: str) -> None:
    with pytest.raises(HubError, match="is not a repository name"):
        build_package(folder, name)


@pytest.mark.parametrize(
    ("theirs", "asked", "published"),
    [
        ("cc-by-nc-sa-4.0", None, "cc-by-nc-sa-4.0"),
        ("cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("cc-by-nc-sa-4.0", "apache-2.0", None),
        ("cc-by-nc-sa-4.0", "cc-by-nc-4.0", None),
        ("cc-by-nc-4.0", "cc-by-sa-4.0", None),
        ("cc-by-sa-4.0", "cc-by-nc-sa-4.0", None),
        ("apache-2.0", "mit", None),
        ("mit", "apache-2.0", "apache-2.0"),
        ("mit", "bsd-3-clause", "bsd-3-clause"),
        ("apache-2.0", "cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
        ("apache-2.0", "my-own", None),
        ("their-own", "apache-2.0", None),
        ("their-own", "their-own", "their-own"),
        (None, "mit", "mit"),
        (None, None, None),
    ],
)
def test_licences(theirs: str | None, asked: str | None, published: str | None) -> None:
    if published is None:
        with pytest.raises(HubError, match=r"is not as strict|add --licence"):
            choose_licence(theirs, asked)
    else:
        assert choose_licence(theirs, asked) == published


def test_no_licence_is_looser_than_itself() -> None:
    for theirs in STRICTNESS:
        allowed = {asked for asked in STRICTNESS if _allowed(theirs, asked)}
        assert theirs in allowed
        assert all(STRICTNESS[asked] >= STRICTNESS[theirs] for asked in allowed)
        assert "-nc" not in theirs or all("-nc" in asked for asked in allowed)


def _allowed(theirs: str, asked: str) -> bool:
    try:
        return choose_licence(theirs, asked) == asked
    except EdmDistillError:
        return False
