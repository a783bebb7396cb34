"""edmdistill export."""

import json
from pathlib import Path

from click.testing import CliRunner, Result

from edmdistill.cli import main


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words)])


def test_text_and_json(golden: Path, tmp_path: Path):
    source, out = golden / "edm-tiny-cond.pkl", tmp_path / "out"
    result = run(source, "--to", "nvidia", "--out", out)
    assert result.exit_code == 0, result.output
    assert "nfe difference\n" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "export.json", "model.safetensors", "network.json")
    ]
    result = run(source, "--to", "nvidia", "--out", out)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    document = json.loads(run(source, "--to", "nvidia", "--out", out, "--overwrite", "--json").stdout)
    assert document["schema_version"] == 1
    assert document["parity"] == json.loads((out / "export.json").read_text())["parity"]
