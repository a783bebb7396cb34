"""Options that have no effect are refused, with a way out that works."""

import tomllib
from typing import Any

import msgspec
import pytest

from edmdistill.defaults import defaults, refuse_idle, toml
from edmdistill.errors import RecipeError
from edmdistill.recipes.library import load_recipe

BETAS = [f"training.betas_by_role.{role}=[0.0, 0.99]" for role in ("generator", "auxiliary")]


class Options(msgspec.Struct):
    images: int
    weight: float = 0.5
    names: dict[str, int] = {}
    levels: tuple[float, ...] = (2.5, 1.0)
    penalty: float | None = None


def test_defaults_are_those_of_a_new_struct() -> None:
    assert (
        defaults(Options)
        == defaults(Options(3, weight=1.0))
        == {name: getattr(Options(3), name) for name in ("weight", "names", "levels", "penalty")}
    )


@pytest.mark.parametrize("value", [0.5, "hinge", True, (2.5, 1.0), ["a b", 'c"d'], 3, ()], ids=str)
def test_a_value_is_read_back_from_toml(value: Any) -> None:
    read = tomllib.loads(f"value = {toml(value)}")["value"]
    assert read == (list(value) if isinstance(value, tuple) else value)


def test_only_what_differs_is_named() -> None:
    names = "weight", "names", "levels", "penalty"
    refuse_idle(Options(3), names, "a = 0", "set a")
    with pytest.raises(ValueError, match=r"^with a = 0, levels has no effect: set a, or levels = \[2\.5, 1\.0\]$"):
        refuse_idle(Options(3, levels=()), names, "a = 0", "set a")
    with pytest.raises(ValueError, match=r"weight and penalty have no effect: set a, or weight = 0\.5 and no penalty"):
        refuse_idle(Options(3, weight=2.0, penalty=1.0), names, "a = 0", "set a")


@pytest.mark.parametrize(
    ("recipe", "sets", "sentence", "way_out"),
    [
        ("ctm/digits-gan", ["method.gan=0"], "gan_channels and gan_augment have no effect", ["method.gan=1"]),
        ("fmd/digits-tangents", ["method.objective=lagrangian"], "warmup_images has", ["method.warmup_images=0"]),
        ("cosim/digits", ["method.R=8"], 'with order = "t", R has no effect', ["method.R=4"]),
        ("diffusion/digits", ["sampling.gamma=0"], "[sampling]: with method.name", ["sampling.gamma=1.0"]),
        ("sid/digits", ["training.betas=[0.0, 0.9]", *BETAS], "betas has", ["training.betas=[0.9, 0.999]"]),
        ("scd/cifar10", ["training.decay_share=0.1"], "decay_share has", ["training.decay_share=0.5"]),
        ("scd/imagenet64-s", ["ema.rampup_ratio=0.1"], "with no half_life_images", ["ema.half_life_images=9"]),
    ],
)
def test_a_recipe_is_refused_and_the_advice_works(
    recipe: str, sets: list[str], sentence: str, way_out: list[str]
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, sets=sets)
    assert sentence in str(error.value)
    assert load_recipe(recipe, sets=[*sets, *way_out])
