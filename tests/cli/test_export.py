"""edmdistill export."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edmdistill.cli import main
from edmdistill.export.folder import TARGETS

GENERATOR = Path(__file__).parent.parent / "checkpoints" / "format-1.0"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words)])


COMMANDS = {
    "sample": ["SOURCE", "--seeds", "0", "--out", "DIR/images"],
    "eval": ["SOURCE", "--protocol", "digits", "--n", "2"],
    "inspect": ["SOURCE"],
    "convert": ["SOURCE", "DIR/converted"],
    "export": ["SOURCE", "--to", "nvidia", "--out", "DIR/again"],
    "push-to-hub": ["SOURCE", "me/it", "--dry-run"],
    "plan": ["cosim/digits", "SOURCE"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("to", TARGETS)
def test_an_export_is_named_where_a_checkpoint_is_asked_for(to: str, command: str, tmp_path: Path) -> None:
    """But for a Space, which holds one."""
    source = tmp_path / "out"
    source.mkdir()
    (source / "export.json").write_text(json.dumps({"to": to}))
    files = {"diffusers": "model_index.json", "onnx": "model.onnx", "nvidia": "model.safetensors"}
    (source / files.get(to, "README.md")).write_text("{}")
    if to == "space":
        shutil.copytree(GENERATOR, source / "generator")
    words = [word.replace("SOURCE", str(source)).replace("DIR", str(tmp_path)) for word in COMMANDS[command]]
    result = CliRunner().invoke(main, [command, *words])
    sentence = f"{source} is what `export --to {to}` wrote for other programs: give the checkpoint or the run that was"
    assert (sentence in result.stderr) == (to != "space"), result.output
    assert to == "space" or result.exit_code == 2
    if to == "space" and command == "sample":
        assert result.exit_code == 0, result.output


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


@pytest.mark.parametrize("text", ["[]", '{"to": ["onnx"]}', '{"to": "onnx\\u001b[2J"}', "{", "[" * 100_000])
def test_a_damaged_export_is_a_folder_without_a_checkpoint(tmp_path: Path, text: str) -> None:
    (tmp_path / "export.json").write_text(text)
    words = ["sample", str(tmp_path), "--seeds", "0", "--out", str(tmp_path / "images")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert f"{tmp_path} is not a checkpoint because it has no config.json: use a converted" in result.stderr
