"""A Space draws what its caption says."""

import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tolerance import depth, rounding

from edmdistill import __version__
from edmdistill.checkpoints.load import load_flow, load_generator
from edmdistill.cli import main
from edmdistill.errors import EdmDistillError
from edmdistill.export.folder import export
from edmdistill.export.space import GRADIO
from edmdistill.sampling.decode import model_decoder
from edmdistill.sampling.generate import sample

RGB = "edm2-rgb-cond.pkl"


def assert_space_draws_ours(source: Path, out: Path) -> None:
    """By the same code and weights, which a file lends in the one case and not in the other."""
    network = load_flow(source)[0]
    for row in export(source, "space", out):
        assert row.difference <= rounding(network.dtype, row.nfe * depth(network))


@pytest.fixture(scope="module")
def space(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spaces") / "space"
    assert_space_draws_ours(runs / "pixels", out)
    return out


def test_a_space_is_whole_and_says_what_it_needs(space: Path):
    assert sorted(path.name for path in space.iterdir()) == [
        *("README.md", "app.py", "export.json", "generator", "requirements.txt")
    ]
    head = (space / "README.md").read_text().split("---")[1]
    for line in ("sdk: gradio", "app_file: app.py", f"sdk_version: {GRADIO}", "license: other"):
        assert f"\n{line}\n" in head
    needed = (space / "requirements.txt").read_text().splitlines()
    assert {f"edmdistill=={__version__}", f"gradio=={GRADIO}"} < set(needed)


@pytest.fixture
def app(space: Path, monkeypatch: pytest.MonkeyPatch):
    """The app as Python runs it, where there is no gradio."""
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delenv("GENERATOR", raising=False)
    return SimpleNamespace(**runpy.run_path(str(space / "app.py")))


def test_a_space_draws_what_its_caption_says_and_does_not_blur_it(app, space: Path, tmp_path: Path):
    model = load_generator(app.SOURCE)
    assert app.classes(model) == [("drawn by each seed", -1), *((f"class {i}, number {i}, digit", i) for i in range(3))]
    first = app.settings(model)
    assert (first["nfe"], first["gamma"], first["guidance"]) == (2, 0.7, 1.0)
    picture, said = app.draw(model, **first | {"gamma": 0.3, "label": 1, "seed": 5, "count": 3, "guidance": 2.0})
    (line,) = (line for line in said.splitlines() if line.startswith("edmdistill"))
    words = [str(space / "generator") if word == "generator" else word for word in shlex.split(line)[1:]]
    result = CliRunner().invoke(main, [*words[:-1], str(tmp_path / "images")])
    assert result.exit_code == 0, result.output
    scale = 640 // 2 // 8
    for index in range(3):
        x, y = (index % 2 * (8 * scale + 2), index // 2 * (8 * scale + 2))
        found = np.asarray(picture.crop((x, y, x + 8 * scale, y + 8 * scale)))
        with Image.open(next((tmp_path / "images").rglob(f"*{5 + index}.png"))) as image:
            assert np.array_equal(found, np.asarray(image).repeat(scale, 0).repeat(scale, 1))
    picture, said = app.draw(model, **first | {"seed": None, "count": 1})
    assert picture.size == (640, 640)
    assert "--seeds 0 " in said


def test_a_space_has_both_times(runs: Path, tmp_path: Path):
    assert_space_draws_ours(runs / "jumps", tmp_path / "out")


def test_a_space_of_latents_holds_its_vae(runs: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    export(runs / "latents", "space", tmp_path / "space", vae=vae)
    assert "edmdistill[latent]==" in (tmp_path / "space" / "requirements.txt").read_text()
    assert "`vae` holds tiny-vae, which decodes the latents" in (tmp_path / "space" / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delenv("GENERATOR", raising=False)
    page = SimpleNamespace(**runpy.run_path(str(tmp_path / "space" / "app.py")))
    model = load_generator(page.SOURCE)
    picture, said = page.draw(model, **page.settings(model) | {"seed": 3, "count": 1})
    assert "--vae stabilityai/sd-vae-ft-mse" in said
    expected = model_decoder(model, vae)(sample(model, 2, seeds=[3]))[0].permute(1, 2, 0).numpy()
    scale = 640 // expected.shape[0]
    difference = np.asarray(picture).astype(int) - expected.repeat(scale, 0).repeat(scale, 1)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("name", "message"), [("latents", "a Space shows pictures, .* --vae"), (None, "is a teacher")])
def test_a_space_is_for_generators_of_images(runs: Path, golden: Path, tmp_path: Path, name: str | None, message: str):
    with pytest.raises(EdmDistillError, match=message):
        export(runs / name if name else golden / RGB, "space", tmp_path / "out")
    assert not (tmp_path / "out").exists()
