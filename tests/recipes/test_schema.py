"""The resolved recipe: it comes back equal, and one that is broken gets a sentence."""

import pytest

from edmdistill.errors import RecipeError
from edmdistill.recipes.library import load_recipe, recipe_names
from edmdistill.recipes.schema import Recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_comes_back_equal(name: str):
    recipe = load_recipe(name, method=name.split("/")[0])
    back = Recipe.from_json(recipe.to_json())
    assert back == recipe
    assert back.hash == recipe.hash
    assert isinstance(recipe.method, recipe.method_class.Config)


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b'{"method": {"name": "cosim"}}'])
def test_a_broken_resolved_recipe_gets_one_sentence(text: bytes):
    with pytest.raises(RecipeError, match="the resolved recipe"):
        Recipe.from_json(text)
