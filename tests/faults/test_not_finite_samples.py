"""Numbers that are not finite: options by range, samples where they leave, metrics."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tiny_generator import tiny_generator

from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.load import load_model
from edmdistill.cli import main
from edmdistill.errors import EdmDistillError, NotFiniteError
from edmdistill.evaluation.evaluate import evaluate
from edmdistill.export import parity
from edmdistill.sampling.generate import not_finite, require_finite, sample
from edmdistill.sampling.heun import Churn
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.sampling.trajectory import ReferenceGuidance


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator(tmp_path_factory.mktemp("good") / "generator")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generator(tmp_path_factory.mktemp("teacher") / "teacher", stage="teacher")


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network gives infinity in one pixel for every seed whose noise begins below -1."""
    whole = Generator.jump

    def jump(self: Generator, x_t: torch.Tensor, *args: Any) -> torch.Tensor:
        x0 = whole(self, x_t, *args)
        x0[x_t[:, 0, 0, 0] < -0.5, 0, 3, 3] = float("inf")
        return x0

    monkeypatch.setattr(Generator, "jump", jump)


def run(command: str, *words: object) -> Result:
    return CliRunner().invoke(main, [command, *map(str, words), "--device", "cpu"])


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e30"])
@pytest.mark.parametrize(
    "option",
    ["--guidance", "--gamma", "--t", "--churn", "--churn-min", "--churn-noise", "--reference-weight", "--reject"],
)
def test_options_of_sample(teacher: Path, tmp_path: Path, option: str, value: str) -> None:
    result = run("sample", teacher, option, value, "--seeds", 0, "--out", tmp_path / "a")
    assert (result.exit_code, result.stdout) == (2, "")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("eval", ["--guidance", "nan"]),
        ("eval", ["--gamma", "nan"]),
        ("eval", ["--nfe", "99999999999"]),
        ("eval", ["--tolerance", "nan"]),
        ("sweep", ["--gamma", "0,nan"]),
        ("sweep", ["--guidance", "-1"]),
        ("sweep", ["--nfe", "1,99999999999"]),
    ],
)
def test_options_of_measurements(good: Path, command: str, words: list[str]) -> None:
    nfe = [] if "--nfe" in words or command == "eval" else ["--nfe", "1"]
    result = run(command, good, "--protocol", "digits", *nfe, *words)
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize(
    "options",
    [{"guidance": x} for x in (float("nan"), float("inf"), -1.0, 1e30)] + [{"nfe": 10**11}, {"nfe": 0}, {"batch": 0}],
)
def test_options_in_python(teacher: Path, options: dict[str, Any]) -> None:
    with pytest.raises(EdmDistillError, match=r"must be|at least 1"):
        sample(load_model(teacher), seeds=[0], **options)


@pytest.mark.parametrize("options", [{"gamma": float("nan")}, {"times": [float("nan")]}, {"times": [float("inf")]}])
def test_a_generators_options_in_python(good: Path, options: dict[str, Any]) -> None:
    with pytest.raises(EdmDistillError):
        sample(load_model(good), seeds=[0], **options)


@pytest.mark.parametrize("value", [float("nan"), -1.0, 1e30])
def test_records_of_options(value: float) -> None:
    for name in ("strength", "sigma_min", "inflation"):
        with pytest.raises(EdmDistillError, match=f"churn's {name} must be in"):
            Churn(**{name: value})
    with pytest.raises(EdmDistillError, match="weight of a reference"):
        ReferenceGuidance(image=torch.zeros(1, 8, 8), features=lambda x: x, weight=value)


@pytest.mark.usefixtures("some")
def test_an_image_with_one_such_pixel_is_nan_throughout(good: Path) -> None:
    images = sample(load_model(good), 1, seeds=range(16))
    broken = not_finite(images)
    assert 0 < int(broken.sum()) < 16
    assert bool(images[broken].isnan().all())
    with pytest.raises(NotFiniteError, match=rf"^{int(broken.sum())} of 16 images are not finite \(seeds "):
        require_finite(images, range(16))


@pytest.mark.usefixtures("some")
@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_the_finite_ones_are_written(good: Path, tmp_path: Path, name: str) -> None:
    broken = not_finite(sample(load_model(good), 1, seeds=range(16))).nonzero().flatten().tolist()
    out = tmp_path / name
    words = ["sample", good, "--nfe", 1, "--seeds", "0-15", "--batch", 5, "--out", out]
    result = run(*words)
    assert result.exit_code == 1
    assert f"{len(broken)} of 16 images are not finite (seeds {broken[0]}" in result.stderr
    if name == "out":
        written = sorted(int(file.stem) for file in out.glob("0*.png"))
        assert written == sorted(set(range(16)) - set(broken))
        assert (out / "dataset.json").read_text().count(".png") == len(written)
        again = run(*words)
        assert again.exit_code == 1
        assert "images are not finite" in again.stderr
    if name == "out.npz":
        with np.load(out) as file:
            assert sorted({*range(16)} - {*file["seeds"].tolist()}) == broken


@pytest.mark.parametrize("name", ["out", "out.npz", "out.png"])
def test_nothing_but_such_images(tmp_path: Path, name: str) -> None:
    source = tiny_generator(tmp_path / "generator", scale=1e38)
    result = run("sample", source, "--nfe", 2, "--seeds", "0-3", "--out", tmp_path / name)
    assert result.exit_code == 1, result.output
    assert "4 of 4 images are not finite (seeds 0-3)" in result.stderr
    assert not list(tmp_path.glob("out/0*.png"))
    assert not (tmp_path / "out.png").exists()


def test_no_metric_of_them(tmp_path: Path) -> None:
    source = tiny_generator(tmp_path / "generator", scale=1e38)
    for words in (("eval", source), ("sweep", source)):
        out = tmp_path / "results.json"
        result = run(*words, "--protocol", "digits", "--nfe", "2", "--n", 4, "--save", "--out", out)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "2 NFE: 4 of 4 images are not finite" in result.stderr
        assert not out.exists()
    with pytest.raises(NotFiniteError):
        evaluate(load_model(source), protocol="digits", sampler=SamplerSpec(nfe=2), seeds=range(3))


def test_no_export_of_them(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(good)
    assert isinstance(model, Generator)
    monkeypatch.setattr(parity, "sample", lambda *args, seeds, **options: torch.full((len(seeds), 1, 8, 8), torch.nan))
    with pytest.raises(NotFiniteError, match="3 of 3 images are not finite"):
        parity.compare(model.flow, model.config, lambda nfe: torch.zeros(3, 1, 8, 8))
