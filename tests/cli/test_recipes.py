"""`edmdistill recipes`: what is listed loads, what is copied trains the same, what is wrong is said."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edmdistill.cli import main
from edmdistill.methods import METHODS
from edmdistill.recipes.library import SHIPPED, load_recipe, recipe_files, recipe_names
from edmdistill.recipes.schema import Recipe


def recipes(*words: object) -> Result:
    return CliRunner().invoke(main, ["recipes", *map(str, words)])


def test_list_has_every_name_with_what_it_is_for():
    text = recipes("list").stdout
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line.startswith("  ") and "/" in line[:12])
    assert lines["cosim/cifar10"] == "CoSIM on CIFAR-10, unconditional, 32x32."
    assert sorted(lines) == sorted(file.name for file in recipe_files())
    for file in recipe_files():
        assert text.count(f"  {lines[file.name]}\n") == 1  # one description, however many sizes and variants
        after = text.partition(lines[file.name])[2]
        for title, words in (("sizes", file.sizes), ("variants", file.modes)):
            assert not words or f"{title}: {' '.join(f'-{word}' for word in words)}\n" in after
    assert [entry.summary in text for entry in METHODS.values()] == [True] * len(METHODS)
    assert set(re.findall(r"^  (\w+)/", recipes("list", "sid").stdout, re.MULTILINE)) == {"sid"}
    document = json.loads(recipes("list", "--json").stdout)
    assert [recipe["name"] for recipe in document["recipes"]] == recipe_names()
    assert all("Measured here" in recipe["header"] for recipe in document["recipes"])


def test_show_is_the_file_or_all_that_a_run_reads():
    assert recipes("show", "cosim/imagenet512").stdout == (SHIPPED / "cosim/imagenet512.toml").read_text()
    resolved = recipes("show", "cosim/imagenet512-s", "--resolved", "--set", "training.seed=7").stdout
    assert Recipe.from_json(resolved.encode()) == load_recipe("cosim/imagenet512-s", sets=["training.seed=7"])


def test_a_copy_trains_the_same(tmp_path: Path):
    result = recipes("copy", "cosim/imagenet512-s", tmp_path / "to" / "mine.toml")
    assert result.stdout == (
        f"{tmp_path}/to/mine.toml is written; `--recipe {tmp_path}/to/mine-s.toml` trains with it.\n"
    )
    assert load_recipe(f"{tmp_path}/to/mine-s.toml", "cosim").hash == load_recipe("cosim/imagenet512-s").hash
    valid = recipes("validate", tmp_path / "to" / "mine-s.toml", "--method", "cosim").stdout
    assert valid.endswith(f"hash {load_recipe('cosim/imagenet512-s').hash:.12}.\n")
    base = recipes("copy", "cosim/digits", tmp_path / "to" / "mine.toml", "--overwrite")
    assert base.stdout == f"{tmp_path}/to/mine.toml is written; `--recipe {tmp_path}/to/mine.toml` trains with it.\n"
    assert (tmp_path / "to" / "mine.toml").read_bytes() == (SHIPPED / "cosim/digits.toml").read_bytes()


def test_validate_says_what_would_run(tmp_path: Path):
    (tmp_path / "mine.toml").write_text((SHIPPED / "cosim/digits.toml").read_text().replace('name = "cosim"\n', ""))
    sets = ("--set", "training.images=24000", "--set", "training.batch=2000")
    result = recipes("validate", tmp_path / "mine.toml", "--method", "cosim", *sets)
    assert "mine.toml is valid: cosim, 24,000 images in batches of 2,000, hash " in result.stdout
    shown = recipes("show", tmp_path / "mine.toml", "--resolved", "--method", "cosim", *sets).stdout
    assert shown.endswith("}\n")
    assert not shown.endswith("\n\n")
    assert Recipe.from_json(shown.encode()).hash.startswith(result.stdout.strip().rpartition(" ")[2].rstrip("."))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("list", "cosin"), "there are no recipes for 'cosin'; did you mean 'cosim'?"),
        (("show", "cosim/digit"), "there is no recipe 'cosim/digit'; did you mean 'cosim/digits'?"),
        (("show", "cosim/digits-quick"), "has no variant 'quick'; did you mean 'quickstart'?"),
        (("show", "cosim/digits", "--set", "training.seed=7"), "--method and --set need --resolved"),
        (("show", "cosim/digits", "--method", "cosim"), "--method and --set need --resolved"),
        (("copy", "cosim/digits", "{here}/mine"), "must end in .toml"),
        (("copy", "cosim/digits", "{here}/there.toml"), "already exists: choose another name"),
        (("validate", "{here}/there.toml"), "method.name = None; choose one of"),
        (("validate", "cosim/digits", "--set", "training.lr=0"), "training.lr = 0 must be above 0"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path: Path, words: tuple[str, ...], sentence: str):
    (tmp_path / "there.toml").write_text("[training]\n")
    result = recipes(*(word.format(here=tmp_path) for word in words))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert sentence in result.stderr.splitlines()[-1]
    assert (tmp_path / "there.toml").read_text() == "[training]\n"
