"""A licence is checked before anything is converted, and is written as the Hub writes it."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from edmdistill.checkpoints.convert import convert
from edmdistill.checkpoints.layout import CARD
from edmdistill.checkpoints.published_generators import convert_generator
from edmdistill.cli import main
from edmdistill.errors import CheckpointError


def test_its_case_is_normalized(golden: Path, tmp_path: Path) -> None:
    done = convert(golden / "edm-tiny-cond.pkl", tmp_path / "out", licence=" Apache-2.0")
    assert done.config.provenance.licence == "apache-2.0"
    assert "license: apache-2.0" in (tmp_path / "out" / CARD).read_text()
    assert not convert(golden / "edm-tiny-cond.pkl", tmp_path / "out", licence="apache-2.0").written
    assert not convert(golden / "edm-tiny-cond.pkl", tmp_path / "out").written
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):  # under another licence
        convert(golden / "edm-tiny-cond.pkl", tmp_path / "out", licence="mit")


@pytest.mark.parametrize(
    "licence", ["", "my own licence", "mit\nlicense: cc0-1.0", "../mit", "x" * 5000, "mit: [", "\x1b[31m"]
)
def test_what_is_no_licence_is_refused_before_any_work(golden: Path, tmp_path: Path, licence: str) -> None:
    with pytest.raises(CheckpointError, match="is neither an identifier of the Hub nor a name"):
        convert_generator(golden / "edm-tiny-cond.pkl", tmp_path / "generator", "sid", licence=licence)
    assert not (tmp_path / "generator").exists()
    out = tmp_path / "out"
    with pytest.raises(CheckpointError) as caught:
        convert(golden / "edm-tiny-cond.pkl", out, licence=licence)
    assert str(caught.value).isprintable()
    result = CliRunner().invoke(main, ["convert", str(golden / "edm-tiny-cond.pkl"), str(out), "--licence", licence])
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())
