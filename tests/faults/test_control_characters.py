"""Nothing that a stranger chose reaches a terminal as a control character."""

import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edmdistill.checkpoints.inspect import to_text
from edmdistill.checkpoints.official import load_official
from edmdistill.cli import main
from edmdistill.errors import CheckpointError, EdmDistillError, TrainingError, printable

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
