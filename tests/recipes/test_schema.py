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


def test_the_hash_is_of_what_changes_the_computation():
    recipe = load_recipe("cosim/digits")
    same = ["training.compile=default"], ["evaluation.protocol=digits", "evaluation.every=36000"]
    other = ["training.seed=1"], ["method.coef=1.5"], ["sampling.gamma=0.5"], ["data.xflip=true"]
    assert {load_recipe("cosim/digits", sets=sets).hash for sets in same} == {recipe.hash}
    assert len({load_recipe("cosim/digits", sets=sets).hash for sets in other} | {recipe.hash}) == 5
    roles = ["training.lr_by_role.auxiliary=1e-3", "training.lr_by_role.generator=1e-4"]
    assert load_recipe("cosim/digits", sets=roles).hash == load_recipe("cosim/digits", sets=roles[::-1]).hash


def test_a_run_may_be_one_batch():
    assert load_recipe("cosim/digits", sets=["training.images=12"]).training.images == 12


def test_a_whole_float_is_an_integer_where_one_is_asked_for():
    floats = ["images=1e5", "batch=8.0", "lr=1.0", "betas=[0.0, 0.5]"]
    table = load_recipe("diffusion/digits", sets=[f"training.{text}" for text in floats]).training
    assert (table.images, table.batch, table.lr, table.betas) == (100_000, 8, 1.0, (0.0, 0.5))
    types = [type(value) for value in (table.images, table.batch, table.lr, *table.betas)]
    assert types == [int] * 2 + [float] * 3
    sets = [
        ["sampling.nfe=[2.0, 35.0]", "network.arguments.num_blocks=2e0", "ema.half_life_images=5e2"],
        ["sampling.nfe=[2, 35]", "network.arguments.num_blocks=2", "ema.half_life_images=500"],
    ]
    assert len({load_recipe("diffusion/digits", sets=some).hash for some in sets}) == 1


@pytest.mark.parametrize("text", ["1.5", "1e-3", "nan", "inf", "'1e5'", "true"])
def test_what_is_no_whole_number_is_refused(text: str):
    with pytest.raises(RecipeError, match=r"training\.images = .* must be a whole number"):
        load_recipe("cosim/digits", sets=[f"training.images={text}"])


EVALUATION = ["evaluation.protocol=digits", "training.log_every=1000"]
BETAS = [f"training.betas_by_role.{role}=[0,0.9]" for role in ("generator", "auxiliary")]


@pytest.mark.parametrize(
    ("name", "sets", "sentence"),
    [
        ("cosim/digits", ["training.lr_decay=constant"], 'with lr_decay = "constant", decay_share has no effect'),
        ("cosim/digits", BETAS, "[training]: with betas_by_role of every role, betas has no effect"),
        ("diffusion/digits", ["sampling.gamma=0.5"], '[sampling]: with method.name = "diffusion", gamma has no effect'),
        ("diffusion/digits", ["sampling.sigmas.2=[80,1]"], "sigmas has no effect: leave it out"),
        ("scd/imagenet64-s", ["ema.rampup_ratio=0.1"], "with no half_life_images, rampup_ratio has no effect"),
        ("scd/imagenet64-s", ["ema.snapshot_every=1000"], "post-hoc EMA, which needs two averages: set two or more"),
        ("cosim/digits", [*EVALUATION, "evaluation.every=2500"], "of training.log_every, 1000, such as 3000"),
        ("cosim/digits", ["training.images=1e300"], "images = 1e+300 must be at most 999999999999"),
        ("cosim/digits", ["training.seed=1e300"], "seed = 1e+300 must be finite, and at most 1e+15"),
        ("diffusion/digits", ["network.arguments.a=-1e16"], "must be finite, and at most 1e+15"),
        ("diffusion/digits", ["network.arguments.a=[1, -inf]"], "must be finite, and at most 1e+15"),
        ("cosim/digits", ["training.optimizer=sgd"], "training.optimizer = 'sgd': choose one of adam, radam, adam8bit"),
    ],
)
def test_what_has_no_effect_or_no_meaning_gets_one_sentence(name: str, sets: list[str], sentence: str):
    with pytest.raises(RecipeError) as error:
        load_recipe(name, sets=sets)
    assert sentence in str(error.value)
    assert str(error.value).startswith(f"{name}: ")


def test_what_these_sentences_advise_works():
    sets = [*EVALUATION, "evaluation.every=3000"], ["ema.sigma_rel=[0.05,0.1]", "ema.snapshot_every=1000"]
    evaluated, averaged = (load_recipe("cosim/digits", sets=more) for more in sets)
    assert (evaluated.evaluation.every, averaged.ema.snapshot_every) == (3000, 1000)
    training = load_recipe("cosim/digits", sets=[*BETAS, "training.betas=[0.9,0.999]"]).training
    assert training.of("generator").betas == (0, 0.9)
    assert load_recipe("cosim/digits").training.of("generator").betas == (0.9, 0.99)
