"""`edmdistill data stats`."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from edmdistill.cli import main
from edmdistill.cli.types import FEATURES
from edmdistill.embedded import EMBEDDED
from edmdistill.evaluation.references import open_statistics
from edmdistill.features.spaces import FEATURE_SPACES


def test_stats_of_digits(tmp_path: Path) -> None:
    out = tmp_path / "stats.npz"
    arguments = ["data", "stats", "digits", str(out), "--split", "test", "--keep-features", "20", "--device", "cpu"]
    arguments += [
        "--work",
        str(tmp_path / "work"),
        "--features",
        "digits, pixels,digits",
        "--weights",
        f"digits={EMBEDDED['digits'].features}",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == f"{out}: 297 images in digits, pixels\n"
    assert CliRunner().invoke(main, arguments).stderr == f"{out} already holds these statistics.\n"
    for other in (["--keep-features", "21"], ["--split", "train"], ["--features", "digits"]):
        refused = CliRunner().invoke(main, [*arguments, *other])
        assert (refused.exit_code, "already exists: choose another name" in refused.stderr) == (2, True)
    assert not list((tmp_path / "work").iterdir())
    found = open_statistics(out)
    assert list(found.spaces) == ["digits", "pixels"]
    assert all(space.features is not None and len(space.features) == 20 for space in found.spaces.values())


def test_what_a_set_has_to_say_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    arguments = ["data", "stats", "digits", "a.npz", "--split", "test", "--features", "pixels", "--device", "cpu"]
    result = CliRunner().invoke(main, arguments)
    assert result.stderr.splitlines() == [
        "digits is the embedded data set; what has that name here is ./digits.",
        "a.npz: 297 images in pixels",
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--features", "digit"], "'digit' is not known; did you mean 'digits'?"),
        (["--features", ""], "'' is an empty list: give it an entry"),
        (["--weights", "digits"], "'digits' does not have the form NAME=FILE"),
        (["--weights", "digits="], "'digits=' does not have the form NAME=FILE"),
        (["--weights", "vgg=a.pt"], "'vgg' is not known"),
        (["--features", "digits", "--weights", "pixels=a.pt"], "--weights pixels=... is of a feature space that"),
        (["--features", "pixels", "--weights", "pixels=a.pt"], "the feature space pixels has no weights"),
        (["--features", "digits", "--weights", "digits=no.safetensors"], "no.safetensors"),
        (["--features", "digits", "--split", "none"], "the digits have no split 'none'"),
    ],
)
def test_mistakes(tmp_path: Path, options: list[str], why: str) -> None:
    out = tmp_path / "stats.npz"
    result = CliRunner().invoke(main, ["data", "stats", "digits", str(out), "--device", "cpu", *options])
    assert (result.exit_code, why in result.stderr, out.exists()) == (2, True, False), result.stderr


def test_the_names_are_those_of_the_library() -> None:
    assert set(FEATURES) == set(FEATURE_SPACES)
