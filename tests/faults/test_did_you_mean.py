"""A name that is not known is answered by the nearest, or by a few and where to find the rest: never by all."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.cli import main
from edmdistill.errors import RecipeError, did_you_mean
from edmdistill.recipes.library import find_recipe, recipe_names

SHOW = ("recipes", "show")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            (*SHOW, "cosim"),
            "'cosim' is a method, and each data set has a recipe of its own; choose one of cosim/",
        ),
        ((*SHOW, "cosim/"), "is a method, and each data set"),
        (
            (*SHOW, "cosim/wwwwwwwwwwww"),
            "there is no recipe 'cosim/wwwwwwwwwwww'; choose one of cosim/cifar10, cosim/digits, cosim/",
        ),
        ((*SHOW, "cosm/digits"), "did you mean 'cosim/digits'?"),
        ((*SHOW, "cosm"), "there are no recipes for 'cosm'; did you mean 'cosim'?"),
        ((*SHOW, "nope"), "`edmdistill recipes list` lists all"),
        ((*SHOW, "nope/../cosim/digits"), "there is no recipe"),
        ((*SHOW, "cosim/digits.toml"), "the recipe that ships with the package is 'cosim/digits'"),
        ((*SHOW, "mien.toml"), "there is no file mien.toml; did you mean mine.toml?"),
        ((*SHOW, "nowhere/x.toml"), "`edmdistill recipes list` lists those that ship with the package"),
        ((*SHOW, "cosim/digits-nope"), "cosim/digits has no variant 'nope'; choose one of quickstart"),
        ((*SHOW, "ctm/imagenet64-nope"), "ctm/imagenet64 has no variant 'nope'; it has none, so leave it out"),
        (("recipes", "list", "cosin"), "there are no recipes for 'cosin'; did you mean 'cosim'?"),
        (("train", "cosm", "--data", "digits"), "'cosm' is not known; did you mean 'cosim'?"),
        (("train", "xyz", "--data", "digits"), "'xyz' is not known; choose one of diffusion, cosim, sid"),
        (("recpies",), "Did you mean 'recipes'?"),
    ],
)
def test_the_nearest_or_a_few(
    words: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("")
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert sentence in last
    assert sum(name in last.replace(",", " ").split() for name in recipe_names()) <= 5


@given(
    st.text(max_size=30)
    | st.text("a-/.~", min_size=200, max_size=5000)
    | st.just("\0.toml")
    | st.just("a" * 300 + ".toml")
)
def test_no_name_of_a_recipe_ends_in_a_traceback(name: str) -> None:
    with pytest.raises(RecipeError):
        find_recipe(name)


@given(st.text(), st.lists(st.text(min_size=1), unique=True), st.integers(1, 5))
def test_at_most_so_many_are_listed(word: str, known: list[str], most: int) -> None:
    sentence = did_you_mean(word, known, most, "list")
    if not sentence.startswith("did you mean"):
        rest = len(known) - most
        assert sentence.endswith(f" or {rest} more, which `list` lists") == (rest > 0)
