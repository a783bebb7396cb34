"""From a recipe to a run: what the product's checkpoint says of itself."""

from pathlib import Path

import pytest
from toy_runs import TABLES, source_of

from edmdistill.machine.engine import Machine
from edmdistill.recipes.schema import Recipe
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.training.prepare import prepare

CPU = Machine(device="cpu")


@pytest.mark.parametrize(
    ("method", "sampling", "levels"),
    [
        ({"name": "sid", "sigma_init": 5.0}, {}, (5.0,)),
        ({"name": "sida", "sigma_init": 4.0}, {}, (4.0,)),
        ({"name": "vsd"}, {}, (80.0,)),
        ({"name": "dmd2", "gan": 0.0, "levels": [1.5, 0.4]}, {}, (80.0, 1.5, 0.4)),
        ({"name": "ladd", "levels": [1.5]}, {}, (80.0, 1.5)),
        ({"name": "scd", "allow_edm_time": True, "intervals": 4}, {}, (80.0, 1.207107, 0.5, 0.207107)),
        ({"name": "cosim"}, {}, (80.0, 2.515219)),
        ({"name": "sid"}, {"sigmas": {"1": [3.0]}}, (3.0,)),  # the recipe's own
        ({"name": "cosim"}, {"sigmas": {"2": [80.0, 80.0]}}, (80.0, 80.0)),  # CoSIM, proposition 3.8
    ],
)
def test_a_generator_is_sampled_at_the_levels_that_it_learned(
    teacher: Path, method: dict[str, object], sampling: dict[str, object], levels: tuple[float, ...]
) -> None:
    tables = TABLES | {"method": method, "sampling": {"nfe": [1]} | sampling}
    source = source_of(str(method["name"]), teacher)
    run = prepare(Recipe.from_tables(tables, "a test"), data="digits", teacher=source, machine=CPU)
    record = build_sampler(run.model(), SamplerSpec()).record
    assert record.sigmas == pytest.approx(levels, rel=1e-5)
    assert record.nfe == len(levels)
