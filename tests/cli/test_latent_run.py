"""A latent model from beginning to end, by commands: pictures, latents, training, pictures again, a number, a page."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from edmdistill.checkpoints.config import read_config
from edmdistill.cli import main

RECIPE = """
[method]
name = "{method}"
[training]
images = {images}
batch = 16
lr = 1e-3
log_every = 32
snapshot_every = {images}
[ema]
half_life_images = 50
[sampling]
nfe = {nfe}
"""
NETWORK = """
[network]
kind = "edm2"
[network.arguments]
model_channels = 8
channel_mult = [1]
num_blocks = 1
attn_resolutions = []
channels_per_head = 8
"""
CLASSES = "n01440764", "n02012849"


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, [*map(str, words)])
    assert result.exit_code == 0, result.output
    return result


def draw_pictures(folder: Path) -> None:
    """Photographs, as it were: of any size, in folders named by ImageNet's synsets."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(16):
            x = np.linspace(0, 3 + label, 50 + i)[:, None, None] + rng.uniform(0, 6, (1, 40, 3))
            Image.fromarray((127.5 + 127.5 * np.sin(x)).astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.mark.slow
def test_from_pictures_to_a_page(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    vae = golden / "evaluation/latents/tiny-vae"
    dinov2 = f"dinov2={golden / 'evaluation/dinov2/tiny-dinov2.pth'}"
    draw_pictures(tmp_path / "pictures")
    run("data", "prepare", "pictures", "images.zip", "--resolution", 32, "--transform", "center-crop-dhariwal")
    run("data", "encode", "images.zip", "latents.zip", "--vae", vae, "--range", "scm")
    run("data", "stats", "images.zip", "ref.npz", "--features", "dinov2", "--weights", dinov2)
    Path("diffusion.toml").write_text(RECIPE.format(method="diffusion", images=160, nfe=[3]) + NETWORK)
    Path("cosim.toml").write_text(RECIPE.format(method="cosim", images=64, nfe=[1, 2]))
    data = "--data", "latents.zip", "--device", "cpu", "--vae", vae
    run("train", "diffusion", *data, "--recipe", "diffusion.toml", "--run-dir", "teacher")
    run("train", "cosim", "teacher", *data, "--recipe", "cosim.toml", "--run-dir", "generator")
    encoder = read_config(Path("generator/generator")).encoder
    assert (encoder["range"], encoder["vae_name"]) == ("scm", "tiny-vae")

    decoding = "--vae", vae, "--device", "cpu"
    run("sample", "generator", "--nfe", 2, "--seeds", "0-15", *decoding, "--out", "generator/frogs")
    with Image.open("generator/frogs/000015.png") as picture:
        assert picture.size == (32, 32)
    measure = "--ref", "ref.npz", "--metrics", "fd_dinov2", "--n", 16, "--weights", dinov2, "--protocol", "edm2"
    for source in ("teacher", "generator"):
        nfe = 2 if source == "generator" else 3
        run("eval", source, *measure, *decoding, "--nfe", nfe, "--batch", 16, "--save", "--out", f"{source}.json")
    assert "fd_dinov2" in json.dumps(json.loads(Path("generator.json").read_text()))
    table = run("compare", "teacher.json", "generator.json").stdout
    assert table.count("\n|") >= 3
    run("report", "generator", "--out", "page.html")
    assert Path("page.html").read_text().count("data:image/png;base64") >= 4  # grids of training, x0, frogs
    assert len(list(Path("generator/samples").iterdir())) == 2
