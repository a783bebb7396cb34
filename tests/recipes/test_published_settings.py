"""Recipes have the settings of the papers' tables and of the official scripts."""

import pytest
from msgspec.structs import replace

from edmdistill.recipes.library import load_recipe


def test_table_5_of_the_cosim_paper():
    columns = ("cifar10", "imagenet64", "imagenet512-s", "imagenet512-m", "imagenet512-l")
    recipes = [load_recipe(f"cosim/{column}") for column in columns]
    training = [recipe.training for recipe in recipes]
    assert [t.batch for t in training] == [2048] * 5
    assert [t.lr for t in training] == [1e-5, 4e-6, 2e-5, 2e-5, 1e-4]
    assert [t.betas for t in training] == [(0, 0.999)] + [(0, 0.99)] * 4
    assert [t.eps for t in training] == [1e-8] + [1e-12] * 4
    assert [t.images for t in training] == [200_000_000] * 4 + [20_000_000]
    assert [t.dropout for t in training] == [0, 0.1, 0, 0.1, 0.1]
    assert [recipe.method.R for recipe in recipes] == [4, 8, 8, 4, 4]
    assert [recipe.ema.half_life_images for recipe in recipes] == [500_000] + [2_000_000] * 4
    assert {(recipe.method.alpha, recipe.method.coef) for recipe in recipes} == {(1.2, 1.0)}


def test_tables_3_and_4_of_the_scm_paper():
    teachers64, teachers512 = [1048, 1486, 761, 540], [1048, 1048, 696, 598, 376]
    tables = {  # P_mean and P_std, thousands of steps, t_ref, dropout; lists are over the sizes s, m, l, xl, xxl
        "scd/imagenet64": ((-1.0, 1.6), [400] * 4, 35_000, [0.0] * 4),
        "sct/imagenet64": ((-1.0, 1.6), [400] * 4, 35_000, [0.45] * 4),
        "scd/imagenet512": ((-0.8, 1.6), [200] * 5, 70_000, [0.0] + [0.1] * 4),
        "sct/imagenet512": ((-0.8, 1.6), [100] * 5, 70_000, [0.25] + [0.35] * 4),
        "diffusion/imagenet64": ((-0.8, 1.6), teachers64, 35_000, [0.0] + [0.1] * 3),
        "diffusion/imagenet512": ((-0.4, 1.0), teachers512, 70_000, [0.0] + [0.1] * 4),
    }
    for name, (law, steps, t_ref, dropout) in tables.items():
        recipes = [load_recipe(f"{name}-{size}") for size in ("s", "m", "l", "xl", "xxl")[: len(steps)]]
        training = [recipe.training for recipe in recipes]
        of_teachers = name.startswith("diffusion")
        rates = [1e-2, 9e-3, 8e-3, 7e-3, 6.5e-3][: len(steps)]
        assert [t.lr for t in training] == pytest.approx([rate * (1 if of_teachers else 0.01) for rate in rates])
        assert [t.images for t in training] == [thousands * 1000 * 2048 for thousands in steps]
        assert [t.dropout for t in training] == dropout
        assert {(t.batch, t.betas, t.eps, t.decay_images) for t in training} == {
            (2048, (0.9, 0.99), 1e-11, t_ref * 2048)
        }
        assert {(recipe.method.P_mean, recipe.method.P_std) for recipe in recipes} == {law}
        if not of_teachers:
            assert {recipe.ema.sigma_rel for recipe in recipes} == {(0.05,)}
            assert {recipe.method.warmup_images for recipe in recipes} == {10_000 * 2048}
            assert {t.dropout_max_resolution for t in training if t.dropout} <= {16}


def test_the_scripts_of_sids_code():
    """Millions of images, batch, learning rate, dropout, millions of the average's half-life."""
    scripts = {
        "sid/cifar10": (500, 256, 1e-5, 0.13, 0.5),
        "sid/ffhq64": (500, 512, 1e-5, 0.05, 0.5),
        "sid/afhq64": (500, 512, 5e-6, 0.05, 0.5),
        "sid/imagenet64": (1000, 8192, 4e-6, 0.1, 2),
        "sida/cifar10": (300, 256, 1e-5, 0.13, 0.5),
        "sida/ffhq64": (200, 512, 1e-5, 0.05, 0.5),
        "sida/afhq64": (200, 512, 5e-6, 0.05, 0.5),
        "sida/imagenet64": (300, 8192, 4e-6, 0.1, 2),
        "sida/imagenet512-xl": (200, 2048, 5e-5, 0.1, 2),
        "sida/imagenet512-xxl": (100, 2048, 5e-5, 0.1, 2),
    }
    for name, script in scripts.items():
        recipe = load_recipe(name)
        training, half_life = recipe.training, recipe.ema.half_life_images
        assert half_life is not None
        assert (training.images / 1e6, training.batch, training.lr, training.dropout, half_life / 1e6) == script
        assert training.eps == (1e-8 if training.precision == "fp32" else 1e-6)
        assert training.of("auxiliary").betas == (0.0, 0.999)
        assert training.of("generator").betas == ((0.9 if name == "sid/ffhq64" else 0.0), 0.999)
        assert recipe.method.alpha == (1.2 if name.startswith("sid/") and name != "sid/afhq64" else 1.0)


def test_the_script_of_meanflows_code():
    recipe = load_recipe("mean-flow/cifar10")
    method, training = recipe.method, recipe.training
    assert (method.times, method.P_mean, method.P_std, method.share_still) == ("lognormal", -2, 2, 0.25)
    assert (training.batch, training.lr, training.betas, training.dropout) == (1024, 6e-4, (0.9, 0.999), 0.2)
    assert (method.tangent_normalization, method.power, method.c, method.weighting) == ("power", 0.75, 1e-3, "none")
    assert (method.augment, sum(name in ("yflip", "rotation") for name in method.augmentations)) == (0.12, 0)
    assert training.images == 800_000 * 1024
    assert training.lr_rampup_images == 200 * 50_000
    assert 2 ** (-1024 / recipe.ema.half_life_images) == pytest.approx(0.99995, abs=1e-6)


def test_the_settings_of_align_your_flow():
    """What is not known of them is sCM's for the same teacher."""
    for data in "imagenet64-s", "imagenet512-s":
        recipe, other = load_recipe(f"fmd/{data}"), load_recipe(f"scd/{data}")
        method = recipe.method
        assert (method.objective, method.times, method.P_mean, method.P_std) == ("eulerian", "interval", -0.8, 1.0)
        assert (method.c, method.r_max, method.share_to_data) == (0.1, 0.99, 0.0)
        assert (method.guide, method.guidance) == ("network", (1.0, 3.0))
        assert (recipe.training, recipe.ema) == (replace(other.training, dropout_max_resolution=None), other.ema)
        assert method.warmup_images == other.method.warmup_images


def test_the_settings_of_ect_and_ict():
    ect, ict, imagenet = (load_recipe(f"ect/{name}") for name in ("cifar10", "cifar10-ict", "imagenet64-s"))
    assert [r.method.weighting for r in (ect, ict, imagenet)] == ["gap", "gap", "c_out"]
    assert ect.method.intervals is None
    assert (ict.method.intervals, ict.method.P_mean, ict.method.P_std) == ((10, 1280), -1.1, 2.0)
    assert ict.method.c == pytest.approx(0.00054 * (3 * 32 * 32) ** 0.5, rel=2e-3)
    # The paper's K' = floor(K / (log2(s_1 / s_0) + 1)): the number of intervals is doubled seven times.
    assert ict.training.images == 8 * ict.method.stage_images == 400_000 * ict.training.batch
    assert 2 ** (-1024 / ict.ema.half_life_images) == pytest.approx(0.99993, abs=1e-6)
