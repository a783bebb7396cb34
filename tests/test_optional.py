"""Libraries of extras that are missing, or installed and broken: one sentence each, wherever they are needed."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edmdistill import embedded
from edmdistill.checkpoints.vae import diffusers_class
from edmdistill.data.parquet import open_parquet
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.export import diffusers, onnx
from edmdistill.optional import importing
from edmdistill.recipes.schema import TrainingTable
from edmdistill.report.chart import Chart, save_matplotlib
from edmdistill.report.curves import Axis
from edmdistill.training.optimizers import make_optimizer

TRAINING = TrainingTable(images=8, batch=8, lr=1e-3, log_every=8, snapshot_every=8, optimizer="adam8bit")
USES: dict[str, tuple[str, str, Callable[[], object]]] = {
    "adam8bit": (
        "torchao",
        "lowbit",
        lambda: make_optimizer([], TRAINING),
    ),
    "a .pdf": ("matplotlib", "plot", lambda: save_matplotlib(Chart("", [], Axis([0, 1])), Path("a.pdf"), ".pdf", [])),
    "a parquet file": ("pyarrow", "parquet", lambda: open_parquet([Path("a")], Path("a"), "auto", "train")),
    "the digits": ("scikit-learn", "quickstart", lambda: embedded._sklearn("load_digits", "digits")),
    "--to onnx": ("onnxruntime", "onnx", onnx.check_installed),
    "--to diffusers": ("diffusers", "diffusers", diffusers.check_installed),
    "a VAE": ("diffusers", "latent", lambda: diffusers_class("AutoencoderKL", extra="latent", needed_by="a VAE needs")),
}
MODULES = {"scikit-learn": "sklearn"}


def forget(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("use", USES)
def test_a_broken_library(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library, _, call = USES[use]
    module = MODULES.get(library, library)
    if use == "--to onnx" and importlib.util.find_spec("onnx") is None:
        pytest.skip("the extra [onnx] is not installed")
    (tmp_path / f"{module}.py").write_text("raise ImportError('it needs NumPy 2.0,\\nfound 1.26.')")
    monkeypatch.syspath_prepend(tmp_path)
    forget(monkeypatch, module)
    reason = r"which is installed, but cannot be imported \(it needs NumPy 2\.0, found 1\.26\)"
    with pytest.raises(EdmDistillError, match=rf"^{use} needs? {library}, {reason}: pip install --upgrade {library}"):
        call()


@pytest.mark.parametrize("use", USES)
def test_a_missing_library(use: str, monkeypatch: pytest.MonkeyPatch):
    library, extra, call = USES[use]
    module = MODULES.get(library, library)
    if use == "--to onnx" and importlib.util.find_spec("onnx") is None:
        pytest.skip("the extra [onnx] is not installed")
    forget(monkeypatch, module)
    monkeypatch.setitem(sys.modules, module, None)
    advice = rf"pip install 'edmdistill\[{extra}\]'"
    with pytest.raises(EdmDistillError, match=rf"^{use} needs? {library}, which is not installed: {advice}"):
        call()


@pytest.mark.parametrize("raised", [AttributeError("no _ARRAY_API"), OSError("no libGL.so"), RuntimeError("twice")])
def test_any_failure_of_an_import_is_a_sentence(raised: Exception):
    with (
        pytest.raises(DatasetError, match=rf"^pictures need pillow, .* \({raised}\): pip .* pillow, or no$"),
        importing("pillow", extra="x", needed_by="pictures need", error=DatasetError, instead=", or no"),
    ):
        raise raised


def test_what_a_library_needs_is_named():
    with (
        pytest.raises(EdmDistillError, match=r"a VAE needs no_such_module, which is not installed: pip install 'edmd"),
        importing("pillow", extra="latent", needed_by="a VAE needs"),
    ):
        import no_such_module.part  # noqa: F401
