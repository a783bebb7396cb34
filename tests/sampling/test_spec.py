"""SamplerSpec: what it takes, and where it comes from."""

import inspect
from dataclasses import fields

import pytest

from edmdistill.errors import EdmDistillError
from edmdistill.sampling.generate import sample
from edmdistill.sampling.heun import Churn
from edmdistill.sampling.spec import SOLVERS, SamplerSpec


def test_sample_takes_every_field_with_the_same_default() -> None:
    parameters = inspect.signature(sample).parameters
    for field in fields(SamplerSpec):
        assert parameters[field.name].default == field.default


def test_of_arguments_leaves_others_out() -> None:
    arguments = {field.name: field.default for field in fields(SamplerSpec)} | {"nfe": 3, "seeds": [1], "model": None}
    assert SamplerSpec.of_arguments(arguments) == SamplerSpec(nfe=3)


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_and_evaluations_are_each_others_inverse(name: str) -> None:
    solver = SOLVERS[name]
    for steps in (1, 2, 18):
        assert solver.num_steps(solver.nfe(steps)) == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, "a whole one, 1 to 10,000"),
        ({"gamma": 1.1}, "must be in"),
        ({"gamma": float("nan")}, "must be in"),
        ({"solver": "euler"}, "choose one of heun"),
        ({"solver": "ddim", "churn": Churn(strength=1.0)}, "leave out one of the two"),
        ({"force_guidance": True, "guidance": 1.0}, "leave it out"),
        ({"churn": Churn(sigma_min=1.0)}, "need churn, which is 0"),
        ({"churn": (1.0, 5.0, 2.0)}, "sigma_min 5 is above its sigma_max 2"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(EdmDistillError, match=message):
        SamplerSpec(**{name: Churn(*value) if isinstance(value, tuple) else value for name, value in options.items()})
