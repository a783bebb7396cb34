"""A run on a VAE's latents: the network knows their scale, and grids are decoded, where the VAE is at hand."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.encoder import latent_encoder
from edmdistill.checkpoints.vae import WEIGHTS
from edmdistill.data.datasets import Dataset
from edmdistill.errors import CheckpointError, EdmDistillError, TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.networks.flow import Denoiser
from edmdistill.recipes.schema import EvaluationTable, Recipe
from edmdistill.sampling.decode import Decoder, open_decoder
from edmdistill.sampling.generate import is_latent, sample
from edmdistill.training import measure, snapshot
from edmdistill.training.measure import open_evaluation
from edmdistill.training.prepare import prepare
from edmdistill.training.run import Run

CPU = Machine(device="cpu")


@pytest.fixture
def vae(golden: Path) -> Path:
    return golden / "evaluation/latents/tiny-vae"


def write_latents(folder: Path, channels: int = 4, **encoder: object) -> Path:
    """Sixteen latents of 8x8, of standard deviation 2."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        moments = np.concatenate([2 * rng.standard_normal((channels, 8, 8)), np.full((channels, 8, 8), 0.1)])
        np.save(folder / f"{i:02d}.npy", moments.astype(np.float32))
    document = {"labels": [[f"{i:02d}.npy", i % 2] for i in range(16)]} | ({"encoder": encoder} if encoder else {})
    (folder / "dataset.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def latents(tmp_path: Path, vae: Path) -> Path:
    return write_latents(
        tmp_path / "latents",
        vae_name="tiny-vae",
        vae_sha256=sha256_file(vae / WEIGHTS),
        range="scm",
        raw_mean=[0.0] * 4,
        raw_std=[2.0] * 4,
    )


def test_snapshots_are_decoded_to_be_measured(
    begin: Callable[..., Run], vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the VAE, against pictures; the metrics of so many pixels are not the subject, and are left out."""
    run = begin(vae=str(vae))
    table = EvaluationTable(protocol="pixels", every=16, n=4, nfe=(3,))
    run.recipe = replace(run.recipe, evaluation=table)
    with pytest.raises(TrainingError, match=r"data are latents: name pictures.* evaluation.ref"):
        open_evaluation(run)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "0.png")
    run.recipe = replace(run.recipe, evaluation=replace(table, ref=str(tmp_path / "pictures")))
    evaluation = open_evaluation(run)
    assert evaluation is not None
    images, stop = [], Event()

    def draw(
        model: Denoiser, reference: Dataset, *, decode: Decoder, seeds: range, **options: object
    ) -> SimpleNamespace:
        assert is_latent(model)
        assert (reference.img_resolution, options["processes"]) == (64, measure.StoppableProcesses(run.engine, stop))
        images.append(decode(sample(model, 3, seeds=seeds)))
        return SimpleNamespace(metrics={"fd_pixels@4": 1.0})

    monkeypatch.setattr(measure, "evaluate", draw)
    assert evaluation.measure(run, pytest.fail, stop) == {"fd_pixels@4/3 NFE": 1.0}
    assert images[0].shape == (4, 3, 64, 64)
    run.vae, run.decoder = None, None
    with pytest.raises(CheckpointError, match=r"--vae, or remove \[evaluation\]"):
        open_evaluation(run)


def test_jumps_from_latents_are_diagnosed_against_pictures(
    begin: Callable[..., Run], vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the run's own data, by its VAE, in any run whose product jumps."""
    run = begin(vae=str(vae))
    monkeypatch.setattr(run.config.__class__, "stage", "generator")
    monkeypatch.setattr(measure, "evaluate", lambda *args, **options: SimpleNamespace(metrics={}))
    seen: list[tuple[object, ...]] = []

    def look(generator: object, teacher: object, auxiliary: object, data: object, space: object, **options: Any) -> Any:
        seen.append((data, options["reference"].img_resolution, options["decode"]))
        return SimpleNamespace(jumps=[], measures=lambda: {"jump/generator/80": 1.0})

    monkeypatch.setattr(measure, "diagnose_networks", look)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "0.png")
    table = EvaluationTable(protocol="pixels", every=16, n=4, nfe=(3,), ref=str(tmp_path / "pictures"), diagnose=True)
    run.recipe = replace(run.recipe, evaluation=table)
    evaluation = open_evaluation(run)
    assert evaluation is not None
    assert evaluation.measure(run, pytest.fail, Event()) == {"jump/generator/80": 1.0}
    assert seen == [(run.dataset, 64, run.decoder)]


@pytest.fixture
def begin(recipe: Callable[..., Recipe], latents: Path) -> Callable[..., Run]:
    return lambda vae=None, data=latents: prepare(recipe("diffusion"), data=data, machine=CPU, vae=vae)


def test_grids_are_decoded(
    begin: Callable[..., Run], vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "COLUMNS", 2)
    monkeypatch.setattr(snapshot, "GRID_SIGMAS", (2.5,))
    run = begin(str(vae))
    encoder = latent_encoder(run.config.encoder)
    assert encoder is not None
    assert (encoder.range, encoder.vae_name) == ("scm", "tiny-vae")
    assert (encoder.scale, encoder.bias) == ((0.25,) * 4, (0.0,) * 4)
    assert float(run.stream().read(0, 16)[0].std()) == pytest.approx(0.5, rel=0.1)
    drawn: list[torch.Tensor] = []

    def keep(*args: Any, **options: Any) -> torch.Tensor:
        drawn.append(sample(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(snapshot, "sample", keep)
    snapshot.save_sample_grid(run, tmp_path / "samples", print)
    snapshot.save_role_grid(run, tmp_path / "x0", print)
    pictures = open_decoder(run.config.encoder, str(vae))(drawn[0])
    with Image.open(tmp_path / "samples" / "000000000.png") as grid:
        assert grid.size == (2 * 66 - 2, 2 * 66 - 2)
        found = np.asarray(grid)[:64, 66:].astype(int)
    assert np.abs(found - pictures[1].permute(1, 2, 0).numpy()).max() <= 1
    assert (tmp_path / "x0" / "000000000.png").is_file()


def test_without_the_vae_there_are_no_grids(
    begin: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin()
    assert run.notes == (
        "No grids are drawn: this network makes latents, and the VAE tiny-vae is not in the Hub's cache: name the "
        "VAE's folder or its Hub id with --vae.",
    )
    snapshot.save_sample_grid(run, tmp_path / "samples", print)
    snapshot.save_role_grid(run, tmp_path / "samples", print)
    assert not (tmp_path / "samples").exists()
    with pytest.raises(CheckpointError, match="there is no VAE nowhere"):
        begin("nowhere")
    with pytest.raises(EdmDistillError, match="has no effect because the network works on pixels"):
        begin("nowhere", "digits")


def test_latents_of_an_unknown_vae_cannot_be_learnt(begin: Callable[..., Run], tmp_path: Path) -> None:
    assert latent_encoder(begin(None, write_latents(tmp_path / "a")).config.encoder) is not None  # as EDM2's tool does
    with pytest.raises(TrainingError, match="does not say which VAE made its latents"):
        begin(None, write_latents(tmp_path / "b", channels=2))
