"""The code in docs/python.md runs, in its order, and trains a method that the page defines."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from edmdistill import load_generator, sample
from edmdistill.cli import main
from edmdistill.methods import METHODS

ROOT = Path(__file__).parent.parent
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.M | re.S))
FOLDERS = """
from edmdistill.sampling.grid import to_image, to_uint8
for name in "ab":
    Path("folder", name).mkdir(parents=True)
    for i, image in enumerate(to_uint8(images if name == "a" else -images)):
        to_image(image).save(f"folder/{name}/{i}.png")
"""


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FID's weights are not here: the folders are measured in pixels."""
    before, measured = CODE.split('result = edmdistill.evaluate("folder/a"')
    assert measured.count('"edm"') == measured.count('"fid@64"') == 1
    measured = measured.replace('"edm"', '"pixels"').replace('"fid@64"', '"fd_pixels@64"')
    page: Any = ModuleType("python_page")
    monkeypatch.setitem(sys.modules, page.__name__, page)
    monkeypatch.setitem(METHODS, "pairs", METHODS["ect"])  # to be taken out again
    monkeypatch.chdir(tmp_path)
    exec(f'{before}{FOLDERS}result = edmdistill.evaluate("folder/a"{measured}', vars(page))

    assert METHODS["pairs"].load() is page.Pairs
    assert page.outcome == (True, 256)
    assert page.images.shape == (64, 1, 8, 8)
    assert page.mine.shape == (8, 1, 8, 8)
    assert page.result.metrics["fd_pixels@64"] > 1  # an image and its negative
    assert page.run.dataset is page.data
    (was, now) = (load_generator(tmp_path / name) for name in ("runs/pairs", "generator"))
    assert 0 < (sample(was, 1, seeds=[0]) - sample(now, 1, seeds=[0])).abs().max() < 0.1  # one step from it
    compared = CliRunner().invoke(main, ["compare", "pairs.json"])
    assert compared.exit_code == 0, compared.output
    assert "fd_digits@500" in compared.output
