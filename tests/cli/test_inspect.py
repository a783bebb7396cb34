"""edmdistill inspect."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from golden_set import BAD

from edmdistill.cli import main

SOUND_AS_FILES = {
    *("bad-huge-config.pkl", "bad-missing-param.pkl", "bad-modulesrc-exec.pkl", "bad-shape-flat.pkl"),
    *("bad-shape-mismatch.pkl", "bad-unknown-kwarg.pkl"),
}


def test_text(golden: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(golden / "iddpm-adm-uncond.pkl.gz")])
    assert result.exit_code == 0
    assert "class            iDDPMPrecond" in result.stdout
    assert "unusual          only the network" in result.stdout
    assert "model.out_conv.weight" not in result.stdout


def test_json_and_tensors(golden: Path) -> None:
    file = str(golden / "edm2-rgb-cond.pkl")
    assert "tensors" not in json.loads(CliRunner().invoke(main, ["inspect", file, "--json"]).stdout)
    document = json.loads(CliRunner().invoke(main, ["inspect", file, "--json", "--tensors"]).stdout)
    assert document["tensors"]["unet.out_gain"] == ["float16", []]
    assert "unet.out_gain" in CliRunner().invoke(main, ["inspect", file, "--tensors"]).stdout


@pytest.mark.parametrize("name", BAD)
def test_bad(bad: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["inspect", str(bad / name)])
    if name in SOUND_AS_FILES:
        assert result.exit_code == 0
    else:
        assert result.exit_code == 2
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_needs_no_torch(golden: Path) -> None:
    script = (
        "import sys\nfrom edmdistill.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, "inspect", str(golden / "edm-tiny-cond.pkl")], check=True)
