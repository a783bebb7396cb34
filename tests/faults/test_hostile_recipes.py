"""Recipes and overrides that nobody meant: each becomes a Recipe or one sentence, whatever it says."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edmdistill.data.datasets import open_dataset
from edmdistill.errors import RecipeError
from edmdistill.methods import METHODS
from edmdistill.recipes.library import SHIPPED, load_recipe
from edmdistill.recipes.schema import NetworkTable, Recipe
from edmdistill.training.sources import sketch

NUMBERS = [0, -1, 1, 1.5, 1e-320, 1e308, 2**31, 2**63, 10**30, 10**400, math.inf, -math.inf, math.nan]
WORDS = ["", "none", "adam", "\x00", "a" * 5000, "../../etc/passwd", "\N{BELL}", "nan", "{", "[[", "'"]
SCALARS = st.sampled_from([*NUMBERS, *WORDS, True, None]) | st.integers() | st.floats()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*WORDS, "2", "name"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def tables(method: str) -> dict[str, Any]:
    """A sound recipe, with every key that the method has."""
    name = "diffusion/digits" if method == "diffusion" else f"{method}/digits"
    return dict(json.loads(load_recipe(name, method).to_json()))


SOUND = {method: tables(method) for method in sorted(METHODS)}
KEYS = [
    (method, table, key) for method, whole in SOUND.items() for table, own in whole.items() if own for key in own
] + [(method, table, "") for method in SOUND for table in ("training", "method", "variants", "sizes", "x")]


def made(act: Callable[[], Recipe]) -> Recipe | None:
    """Returns what `act` makes, or None if it is refused in one sentence."""
    try:
        return act()
    except RecipeError as error:
        sentence = str(error)
    assert sentence.isprintable()
    assert len(sentence) < 2000
    return None


@settings(max_examples=400)
@given(st.sampled_from(KEYS), VALUES)
def test_a_value_in_a_tables_place(place: tuple[str, str, str], value: object):
    method, table, key = place
    own = SOUND[method]
    changed = own | ({table: own[table] | {key: value}} if key else {table: value})
    recipe = made(lambda: Recipe.from_json(json.dumps(changed).encode()))
    if recipe is not None:
        assert Recipe.from_json(recipe.to_json()) == recipe
        numbers = [value for own in json.loads(recipe.to_json()).values() for value in _numbers(own)]
        assert all(abs(number) <= 1e15 for number in numbers)


def _numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in _numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in _numbers(inner)]
    return [value] if isinstance(value, int | float) else []


@settings(max_examples=200)
@given(
    st.sampled_from(["training.lr", "method.alpha", "sampling.sigmas", "ema", "training.", "a.b.c", "method.name", ""])
    | st.text(max_size=8),
    st.sampled_from(["=", "", "==", " = "]),
    st.sampled_from(
        ["inf", "nan", "-1", "1e999", "[" * 3000, "{a=" * 500, "1979-05-27", "'\x00'", "[]", "{}", "0x", "\n"]
    )
    | st.text(max_size=8),
)
def test_an_override(key: str, equals: str, value: str):
    made(lambda: load_recipe("cosim/digits", "cosim", [f"{key}{equals}{value}"]))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(path for path in SHIPPED.rglob("*.toml"))),
    st.integers(0, 3000),
    st.integers(0, 40),
    st.sampled_from(
        ["", "\x00", "[[", "=", "inf", "sizes = 3\n", "\n[variants]\ns = 1\n", '"', "\r", "[method]\nname = []\n"]
    ),
)
def test_a_file_that_was_cut_and_patched(tmp_path: Path, source: Path, at: int, length: int, patch: str):
    text = source.read_text()
    at %= len(text)
    file = tmp_path / "mine.toml"
    file.write_text(text[:at] + patch + text[at + length :])
    made(lambda: load_recipe(str(file), source.parent.name))


@pytest.mark.parametrize(
    "name", ["", ".", "/", "\x00", "a/b\x00", "x" * 5000, "x" * 5000 + ".toml", "~nobody/x.toml", ".toml", "-"]
)
def test_a_name(name: str):
    assert made(lambda: load_recipe(name)) is None


@pytest.mark.parametrize(
    "line", ["sizes = 3", "sizes = [1]", "variants = 3", "[variants]\ns = 3", "[method]\nname = []"]
)
def test_a_file_of_wrong_types(line: str, tmp_path: Path):
    (tmp_path / "mine.toml").write_text(f"{line}\n")
    name = tmp_path / ("mine-s.toml" if "s = 3" in line else "mine.toml")
    assert made(lambda: load_recipe(str(name), "cosim")) is None


@pytest.mark.parametrize(
    "override",
    [
        "training.lr=inf",
        "training.lr=nan",
        "training.lr=-1",
        "training.lr=1e30",
        "training.images=1000000000000000",
        "method.trajectory_weight=inf",
        "method.trajectory_weight=nan",
        "method.coef=nan",
        "ema.half_life_images=1e400",
        "training.eps=inf",
        "method.R=1000000000",
        "sampling.gamma=nan",
        'sampling.sigmas={"1"=[inf]}',
        "training.betas=[nan, 0.9]",
    ],
)
def test_an_absurd_number(override: str):
    with pytest.raises(RecipeError, match=override.partition("=")[0]):
        load_recipe("cosim/digits", "cosim", [override])


NETWORKS: list[dict[str, object]] = [
    {"model_channels": -8},
    {"model_channels": 10**9},
    {"model_channels": "8"},
    {"model_channels": [8]},
    {"channel_mult": 3},
    {"channel_mult": []},
    {"channel_mult": ["a"]},
    {"num_blocks": 10**9},
    {"num_blocks": None},
    {"channels_per_head": 0},
    {"img_channels": {}},
    {"nothing": 1},
]


@pytest.mark.parametrize("arguments", NETWORKS, ids=repr)
def test_arguments_that_make_no_network(arguments: dict[str, object]):
    table = NetworkTable(kind="edm2", arguments={"model_channels": 8, "channel_mult": [1], "num_blocks": 1} | arguments)
    with pytest.raises(RecipeError) as error:
        sketch(table, open_dataset("digits"))
    assert re.fullmatch(
        r"\[network\] has arg.*: change the recipe's table \[network\]|\[network.arguments\] make a network of .*",
        str(error.value),
    )
    assert str(error.value).isprintable()
