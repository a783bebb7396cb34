"""A recipe's file says all by itself: copied anywhere, under any name, it validates, and its header's commands work."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from edmdistill.checkpoints.source import resolve, source_name
from edmdistill.cli import main
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import RecipeError
from edmdistill.recipes.library import RecipeFile, find_recipe, load_recipe, origins, recipe_files, recipe_header

FILES = recipe_files()
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_a_copy_validates_and_computes_the_same(file: RecipeFile, tmp_path: Path) -> None:
    copy = tmp_path / "any where" / "mine.toml"
    result = CliRunner().invoke(main, ["recipes", "copy", file.names[0], str(copy)])
    assert result.exit_code == 0, result.output
    (called,) = re.findall(r"`--recipe (.*)` trains with it", result.stdout)
    assert CliRunner().invoke(main, ["recipes", "validate", *shlex.split(called)]).exit_code == 0
    for name in file.names:
        assert load_recipe(str(copy.with_name(f"mine{name.removeprefix(file.name)}.toml"))) == load_recipe(name)
    shown = CliRunner().invoke(main, ["recipes", "show", file.names[0]]).stdout
    assert shown == copy.read_text()


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_the_method_of_a_file_is_its_folders(file: RecipeFile) -> None:
    assert load_recipe(file.names[0]).method_name == file.path.parent.name


def test_a_folder_does_not_name_a_method(tmp_path: Path) -> None:
    """The file alone counts: in a folder that happens to be called sid, it is still CoSIM's."""
    (tmp_path / "sid").mkdir()
    shipped = find_recipe("cosim/digits").path
    (tmp_path / "sid" / "a.toml").write_bytes(shipped.read_bytes())
    assert load_recipe(str(tmp_path / "sid" / "a.toml")).method_name == "cosim"


def test_a_file_name_may_have_words_that_are_no_variants(tmp_path: Path) -> None:
    """And a variant a name of two words."""
    copy = tmp_path / "my-own-run.toml"
    copy.write_bytes(find_recipe("cosim/digits").path.read_bytes() + b"\n[variants.b-c.training]\nseed = 2\n")
    name = str(tmp_path / "my-own-run-b-c.toml")
    found = origins(load_recipe(name), copy.read_text(), name, [])
    assert found["training.seed"] == {"default": 0, "variant b-c": 2}
    assert not any("later" in said for said in found.values())


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.toml").write_bytes("# für\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.toml cannot be read as TOML: 'utf-8' codec"):
        find_recipe(str(tmp_path / "latin.toml"))

    def refuse(*args: object, **options: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(RecipeError, match=r"latin\.toml cannot be read as TOML: .*Permission denied"):
        find_recipe(str(tmp_path / "latin.toml"))


def commands(header: str) -> list[list[str]]:
    lines = re.sub(r"\\\n\s*", "", header).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip().startswith("edmdistill ")]


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_a_header_works_for_an_installed_package(file: RecipeFile) -> None:
    header = recipe_header(file.path)
    assert not re.search(r"edmdistill/assets|benchmarks/|docs/|tests/|recipes/", header)
    assert commands(header)
    for words in commands(header):
        command = main.get_command(click.Context(main), words[0])
        assert command is not None
        context = command.make_context(words[0], words[1:])
        if words[0] == "train":
            assert load_recipe(context.params["recipe"], context.params["method"])


def test_the_teacher_of_the_package_has_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("digits") == EMBEDDED["digits"].teacher
    assert resolve("digits").is_file()
    assert source_name("digits") == "digits-teacher.pkl"
    Path("digits").mkdir()  # what is here comes first
    assert resolve("digits") == Path("digits")


@pytest.mark.skipif(sys.platform == "win32", reason="has no make")
def test_a_dry_run_of_the_quickstart_shows_every_command(tmp_path: Path) -> None:
    words = ["make", "-n", "quickstart", f"RUN={tmp_path}/run"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"bin/edmdistill (\w+)", done.stdout)
    assert found == ["convert", "train", "sample", "eval", "eval", "report"]
