"""What a method cannot do with a teacher is said before anything is trained."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS
from edmdistill.networks.preconditioning import EDM, IDDPM, VE, VP, Preconditioning
from edmdistill.recipes.library import load_recipe, recipe_names
from edmdistill.training.checks import WARM_UPS, idle_notes, require_edm_time, require_teacher

LEVELS = [(name, option) for name, entry in METHODS.items() for option in entry.load().noise_levels]
TEACHER: Any = SimpleNamespace(
    network=SimpleNamespace(positional_time=True), label_dim=10, label_dropout=0.1, sigma_min=0.01, sigma_max=80.0
)


@pytest.mark.parametrize(("method", "option"), LEVELS, ids=str)
def test_a_noise_level_that_the_teacher_does_not_know_is_refused(method: str, option: str) -> None:
    def check(sigma: float) -> None:
        value = [sigma] if option == "levels" else sigma
        beside = {"anchor_sigma": ["order=t", "R=4"], "fisher_sigma": ["gradient=kl"]}.get(option, [])
        sets = [f"method.{text}" for text in (f"{option}={value}", *beside)]
        require_teacher(load_recipe(f"{method}/digits", sets=sets), TEACHER, force_guidance=False)

    for sigma in (0.01, 1.0, 80.0):
        check(sigma)
    for sigma in (0.009, 80.1):
        with pytest.raises(TrainingError, match=rf"method\.{option} = .*: noise level {sigma} is out of range"):
            check(sigma)


@pytest.mark.parametrize("method", ["scd", "sct", "fmd", "mean-flow"])
def test_allowing_edms_time_is_refused_where_all_networks_read_t(method: str) -> None:
    reads_sigma: Any = SimpleNamespace(network=SimpleNamespace(positional_time=False))
    allowed = load_recipe(f"{method}/digits", sets=["method.allow_edm_time=true"])
    require_edm_time(allowed, [reads_sigma])
    require_edm_time(allowed, [TEACHER, reads_sigma])  # a warm start
    require_edm_time(load_recipe(f"{method}/digits"), [TEACHER])
    with pytest.raises(TrainingError, match="allow_edm_time has no effect"):
        require_edm_time(allowed, [TEACHER, TEACHER])


@pytest.mark.parametrize("method", ["scd", "sct", "fmd", "mean-flow"])
@pytest.mark.parametrize("made", [EDM(), VP(), VE(), IDDPM()], ids=lambda made: type(made).__name__)
def test_a_teacher_that_does_not_read_t_gets_advice_that_fits_it(method: str, made: Preconditioning) -> None:
    """`convert --time-embedding positional` takes EDM's preconditioning alone."""
    teacher = SimpleNamespace(
        **vars(TEACHER) | {"network": SimpleNamespace(positional_time=False)}, preconditioning=made
    )
    with pytest.raises(TrainingError, match="makes continuous-time training unstable") as refused:
        require_teacher(load_recipe(f"{method}/digits"), teacher, force_guidance=False)  # type: ignore[arg-type]
    assert ("--time-embedding positional" in str(refused.value)) == isinstance(made, EDM)
    assert ("use an EDM or EDM2 teacher" in str(refused.value)) != isinstance(made, EDM)
    (advised,) = re.findall(r"--set (\S+)", str(refused.value))
    require_teacher(load_recipe(f"{method}/digits", sets=[advised]), teacher, False)  # type: ignore[arg-type]


def test_every_method_with_such_an_option_is_covered() -> None:
    names = {"levels", "sigma_init", "boundary", "anchor_sigma", "fisher_sigma"}
    options = {name: names.intersection(entry.load().Config.__struct_fields__) for name, entry in METHODS.items()}
    assert {(name, option) for name, some in options.items() for option in some} == set(LEVELS)
    assert names == {option for _, option in LEVELS}


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("scd", "method.warmup_images"),
        ("fmd", "method.trajectory_images"),
        ("sida", "method.gan_warmup_images"),
        ("sid", "training.lr_rampup_images"),
    ],
)
def test_a_warm_up_that_outlasts_the_run_is_said(method: str, option: str) -> None:
    def notes(length: int) -> list[str]:
        others = [f"{name}=0" for name in WARM_UPS if name != option and hasattr(recipe.method, name.split(".")[1])]
        sets = ["training.images=3200", f"{option}={length}", *others]
        return list(idle_notes(load_recipe(f"{method}/digits", sets=sets), Machine(device="cpu")))

    recipe = load_recipe(f"{method}/digits")
    assert notes(3200) == []
    assert notes(3201) == [f"{option} = 3,201 is more than the run's 3,200 images: what it leads up to never begins."]


@pytest.mark.parametrize("name", recipe_names())
def test_no_shipped_recipe_has_a_warm_up_that_outlasts_it(name: str) -> None:
    assert list(idle_notes(load_recipe(name), Machine(device="cpu"))) == []


def test_offloading_is_said_to_save_nothing_on_a_cpu() -> None:
    found = list(idle_notes(load_recipe("sid/digits"), Machine(device="cpu", offload=("ema",))))
    assert found == ["--offload saves nothing on a CPU, whose memory is the host's."]
