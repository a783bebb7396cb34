"""A new method is a file, an entry of METHODS, a recipe and a row in the docs: nothing else lists methods."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import edmdistill
from edmdistill.checkpoints.config import read_config
from edmdistill.errors import EdmDistillError
from edmdistill.methods import METHODS, MethodEntry, _add_installed
from edmdistill.methods.base import Method
from edmdistill.publish.card import CITATIONS
from edmdistill.publish.hub import build_package
from edmdistill.recipes.library import SHIPPED

ROOT = Path(__file__).parent.parent.parent
FILE = '''
from edmdistill.methods.diffusion import Diffusion

class Toy(Diffusion):
    """Counts its losses."""
    calls = 0

    def velocity_loss(self, batch, draws):
        Toy.calls += 1
        return super().velocity_loss(batch, draws)
'''
RECIPE = """
[method]
name = "toy"
P_mean = -1.0
[network]
kind = "edm2"
arguments = {model_channels=8, channel_mult=[1], num_blocks=0, attn_resolutions=[], channels_per_head=8}
[training]
images = 32
batch = 8
lr = 1e-2
log_every = 16
snapshot_every = 32
[ema]
half_life_images = 16
[sampling]
nfe = [1]
"""


def run(*words: object) -> str:
    result = CliRunner().invoke(import_module("edmdistill.cli").main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The recipe of a method that is added to the table; the command line is imported anew, as in a new process."""

    def commands() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("edmdistill.cli")}

    (tmp_path / "toy_method.py").write_text(FILE)
    (tmp_path / "toy.toml").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "toy", MethodEntry("toy_method:Toy", "Toy: a method of a test.", ("zhou2024sid",)))
    monkeypatch.setattr(edmdistill, "cli", None, raising=False)
    before = commands()
    yield tmp_path / "toy.toml"
    commands()
    sys.modules.pop("toy_method", None)
    sys.modules.update(before)


def test_a_toy_method_is_trained_and_published_by_its_line(toy: Path) -> None:
    assert f"{list(METHODS)[-2]}, toy." in re.sub(r"\s+", " ", run("--help"))
    assert "Toy: a method of a test." in run("train", "--help")
    assert "toy_method" not in sys.modules
    assert run("recipes", "validate", toy).startswith(f"{toy} is valid: toy, 32 images")
    where = toy.parent / "run"
    run("train", "toy", "--data", "digits", "--recipe", toy, "--run-dir", where, "--device", "cpu")
    assert sys.modules["toy_method"].Toy.calls >= 4
    assert read_config(where / "generator").method == "toy"
    run("report", where)
    assert "Toy: a method of a test." in (where / "report.html").read_text()
    card = build_package(where, "me/toy", "mit").files["README.md"]
    assert isinstance(card, bytes)
    assert b"Score Identity Distillation" in card


@pytest.mark.parametrize("name", METHODS)
def test_every_line_is_true(name: str) -> None:
    entry = METHODS[name]
    assert issubclass(entry.load(), Method)
    assert entry.summary.endswith(".")
    assert "\n" not in entry.summary
    keys = re.findall(r"^@\w+\{(\w+),$", CITATIONS.read_text(), re.MULTILINE)
    assert set(entry.citations) <= set(keys)
    assert list((SHIPPED / name).glob("*.toml"))


PAPERS: dict[str, dict[str, object]] = {
    "diffusion": {"P_mean": -1.2, "P_std": 1.2},  # EDM, table 1
    "cosim": {"alpha": 1.2, "coef": 1.0, "R": 4, "share_to_max": 0.5, "r_s_max": 1.0, "weight": "sid"},
    "sid": {"alpha": 1.2, "coef": 0.5, "sigma_init": 2.5, "P_mean": -1.2, "P_std": 1.2, "r_s_max": 0.8},
    "sida": {"alpha": 1.0, "gan": 1e-4, "gan_auxiliary": 1.0, "sigma_init": 2.5, "r_s_max": 0.8},
    "dmd2": {"auxiliary_turns": 5, "gan": 3e-3, "gan_auxiliary": 1e-2, "f_divergence": "reverse-kl"},
    "ladd": {"P_mean": 0.3, "P_std": 1.0, "gan_loss": "hinge"},  # logit(t) ~ N(1, 1): ln(sigma / .5) has mean 1
    "kd": {"distance": "l2", "levels": (), "guidance": (1.0, 1.0)},
    "pd": {"steps": 4, "weighting": "snr+1", "guidance": (1.0, 1.0)},
    "sct": {"P_mean": -1.0, "P_std": 1.4, "c": 0.1, "r_max": 1.0},  # sCM, table of CIFAR-10
    "scd": {"P_mean": -1.0, "P_std": 1.4, "c": 0.1, "r_max": 1.0},
    "dscd": {"P_mean": -1.0, "P_std": 1.4, "c": 0.1, "intervals": 1024},
    "vsd": {"vsd_P_mean": 0.4, "vsd_P_std": 2.0, "aux_P_mean": -0.8, "aux_P_std": 1.6},  # sCM, table 4
    "ctm": {"N": 18, "max_steps": 17, "mu": 0.999, "dsm": 1.0, "gan": 1.0, "sampling": "official"},
    "fmd": {"P_mean": -0.8, "P_std": 1.0, "c": 0.1},
    "ect": {"P_mean": -1.1, "P_std": 2.0, "q": 2.0, "k": 8.0, "b": 1.0, "c": 0.0, "stage_images": 25_600_000},
    "tcm": {"P_mean": 0.0, "P_std": 0.2, "degrees": 0.01, "boundary": 1.0, "boundary_share": 0.25}
    | {"boundary_weight": 0.1, "gap": 0.001, "c": 1e-8},
    "cd": {"N": 18, "solver": "heun", "mu": 0.0, "distance": "l2", "weighting": "none"},  # CIFAR-10, official code
    "imm": {"particles": 4, "path": "ot-fm", "k": 12.0, "a": 1.0, "b": 5.0},
}


@pytest.mark.parametrize("name", PAPERS)
def test_defaults_are_the_papers(name: str) -> None:
    config = METHODS[name].load().Config()
    assert {option: getattr(config, option) for option in PAPERS[name]} == PAPERS[name]


def test_the_lists_of_methods_agree() -> None:
    assert {path.name for path in SHIPPED.iterdir() if path.is_dir()} == set(METHODS)
    documented = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert not [name for name in METHODS if not re.search(rf"\b{name}\b", documented)]
    assert f"Train a network by a method: {', '.join(METHODS)}." in re.sub(r"\s+", " ", run("--help"))


def test_another_package_brings_a_method_and_replaces_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_method.py").write_text(FILE)
    installed = tmp_path / "toys-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    points = "[edmdistill.methods]\ntoy = toy_method:Toy\nect = toy_method:Toy\n"
    (installed / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("edmdistill.methods.METHODS", table := dict(METHODS))
    _add_installed()
    assert list(table) == [*METHODS, "toy"]
    assert "toy_method" not in sys.modules
    assert table["toy"].summary == "toy: a method of the package toys."
    assert table["toy"].load().__name__ == "Toy"
    sys.modules.pop("toy_method")
    with pytest.raises(EdmDistillError, match=r"two methods .* uninstall it \(pip uninstall toys\)"):
        table["ect"].load()
    assert table["ect"].summary == METHODS["ect"].summary
