"""Whatever decides the images of `sample` is known again: those of other options are not taken for them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from tiny_generator import tiny_generator

from edmdistill.cli import main

TEACHER = "TEACHER --nfe 3 --class 1 --guide GUIDE --guidance 2"
REFERENCE = (
    "GENERATOR --t 80,.3 --reference A.png --feature-net mask:A.png --reference-weight 9 --correctors 2 --score TEACHER"
)
REJECTION = "GENERATOR --nfe 1 --reject .5 --classifier A.pt"
COMMANDS = {"guided": TEACHER, "with a reference": REFERENCE, "rejected": REJECTION}
OTHERS = {
    "source": ("guided", "TEACHER --nfe", "OTHER --nfe"),
    "seeds": ("guided", "TEACHER", "TEACHER --seeds 1-2"),
    "nfe": ("guided", "--nfe 3", "--nfe 5"),
    "class": ("guided", "--class 1", "--class 2"),
    "guide": ("guided", "--guide GUIDE", "--guide OTHER"),
    "guidance": ("guided", "--guidance 2", "--guidance 3"),
    "solver": ("guided", "TEACHER", "TEACHER --solver ddim"),
    "churn": ("guided", "TEACHER", "TEACHER --churn 2"),
    "dtype": ("guided", "TEACHER", "TEACHER --dtype bfloat16"),
    "times": ("with a reference", "80,.3", "80,.4"),
    "reference": ("with a reference", "--reference A", "--reference B"),
    "features": ("with a reference", "mask:A", "mask:B"),
    "weight": ("with a reference", "weight 9", "weight 8"),
    "correctors": ("with a reference", "correctors 2", "correctors 3"),
    "score": ("with a reference", "score TEACHER", "score GUIDE"),
    "share": ("rejected", "--reject .5", "--reject .4"),
    "classifier": ("rejected", "A.pt", "B.pt"),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sources, and what each of the commands has drawn from them."""
    folder = tmp_path_factory.mktemp("drawn")
    tiny_generator(folder / "GENERATOR")
    for number, name in enumerate(("TEACHER", "GUIDE", "OTHER"), 1):
        tiny_generator(folder / name, stage="teacher", scale=number)
    for number, name in enumerate("AB", 1):
        Image.fromarray(np.full((8, 8), 100 * number, np.uint8)).save(folder / f"{name}.png")
        weights = number * torch.arange(10.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            classifier = torch.jit.trace(lambda x, w=weights: x.mean((1, 2, 3))[:, None] * w, torch.zeros(2, 1, 8, 8))
            classifier.save(str(folder / f"{name}.pt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, command in COMMANDS.items():
            first = sample(name, command)
            assert first.exit_code == 0, first.output
    return folder


def sample(out: str, command: str) -> Result:
    words = command.split()
    return CliRunner().invoke(main, ["sample", "--seeds", "0-1", *words, "--device", "cpu", "--out", out])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_finds_its_images(name: str, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(drawn)
    assert "already holds these 2 images" in sample(name, COMMANDS[name]).stderr
    assert "already holds these 2 images" in sample(name, f"{COMMANDS[name]} --dtype float32").stderr  # the default


@pytest.mark.parametrize("option", OTHERS)
def test_images_of_another_option_are_other_images(option: str, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(drawn)
    name, part, other = OTHERS[option]
    refused = sample(name, COMMANDS[name].replace(part, other, 1))
    assert (refused.exit_code, "holds other samples (" in refused.stderr) == (2, True), refused.output
