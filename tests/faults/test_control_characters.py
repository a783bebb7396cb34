"""Nothing that a stranger chose reaches a terminal as a control character."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from commands import call

from edmdistill.checkpoints.inspect import to_text
from edmdistill.checkpoints.official import load_official
from edmdistill.cli import main
from edmdistill.errors import CheckpointError, EdmDistillError, TrainingError, printable
from edmdistill.progress import progress_bar, write

EVIL = "\x1b[2J\x1b]0;pwned\x07\r\n\u202e\ud800\x9b"


def test_printable() -> None:
    assert printable("plain ümlaut 漢字 e\u0301") == "plain ümlaut 漢字 e\u0301"
    assert printable(EVIL) == r"\x1b[2J\x1b]0;pwned\x07\r\n\u202e\ud800\x9b"
    printable(EVIL).encode("ascii")


def test_errors_are_printable() -> None:
    assert str(EdmDistillError(f"no {EVIL}")).isprintable()
    assert str(TrainingError("a list:", "one", f"two{EVIL}")).splitlines() == [
        "a list:",
        "one",
        f"two{printable(EVIL)}",
    ]


@pytest.mark.parametrize("content", [{EVIL: torch.ones(1)}, {"model": {EVIL: torch.ones(1)}, EVIL: 1}])
def test_weights(content: dict[str, object], tmp_path: Path) -> None:
    name = EVIL.replace("\ud800", "").replace("/", "")
    torch.save({str(key).replace("\ud800", ""): value for key, value in content.items()}, tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        load_official(tmp_path / name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [{EVIL[:-2]: 1}, pickle.PROTO + b"\x04c\x1b[2J\nos\n.", [EVIL[:-2]]])
def test_pickles_at_the_command_line(content: object, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    clean = content if isinstance(content, bytes) else pickle.dumps(content).replace(b"\xed\xa0\x80", b"???")
    path.write_bytes(clean)
    done = CliRunner().invoke(main, ["inspect", str(path)])
    assert done.exit_code == 2
    assert done.output.strip().replace("\n", "").isprintable()


def test_summaries() -> None:
    assert to_text({EVIL: EVIL, "a": [EVIL], "b": {EVIL: EVIL}}).replace("\n", "").isprintable()


NAME = "a\x1b]0;b\x07\x7f\x9b\u202e\U000e0001c"


def test_what_a_command_prints(tmp_path: Path) -> None:
    """Whatever a command prints of a name, of a file or from one, on standard output."""
    name = "a\u202e\U000e0001c.toml"  # MainGroup refuses the others in what is typed
    made = call("recipes", "copy", "cosim/digits", tmp_path / name)
    checked = call("recipes", "validate", tmp_path / name)
    shown = call("recipes", "show", tmp_path / name)
    for result in (made, checked, shown):
        assert result.exit_code == 0
        assert result.output.replace("\n", "").replace("\t", "").isprintable()
    assert "a\\u202e\\udb40\\udc01c.toml" in made.output
    assert shown.output == (tmp_path / name).read_text()


def test_documents_stay_json(tmp_path: Path) -> None:
    protocol = {"name": NAME, "metrics": ["fid"], "features": None}
    result = {"metrics": {NAME: 1.0}, "protocol": protocol, "protocol_sha256": "", "sampler": None, "provenance": {}}
    (tmp_path / "r.json").write_text(json.dumps(result))
    printed = call("compare", tmp_path / "r.json", "--json").stdout
    assert printed.replace("\n", "").isprintable()
    assert json.loads(printed)["rows"][0]["result"]["metrics"] == {NAME: 1.0}


def test_notes_bars_and_what_the_system_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(f"two\nlines of {NAME}")
    with progress_bar(3, desc=NAME, delay=0) as bar:
        bar.update(3)
    said = capsys.readouterr().err
    assert said.startswith("two\nlines of a\\x1b")
    assert said.replace("\n", "").isprintable()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", NAME)

    monkeypatch.setattr("edmdistill.recipes.library.load_recipe", refuse)
    refused = call("recipes", "validate", "cosim/digits")
    assert refused.exit_code == 2
    assert refused.output.replace("\n", "").isprintable()
