"""The networks of a method's roles."""

from toy_runs import TABLES

from edmdistill.checkpoints.store import load_checkpoint
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.recipes.schema import Recipe
from edmdistill.training.roles import build_roles


def test_the_auxiliary_score_reads_t_by_the_recipes_gain(teacher) -> None:
    """Also from a teacher that was converted with a second time, whose gain is 0."""
    flow = load_checkpoint(teacher)[0]
    for source in (flow, add_second_time(flow)):
        for gain in (0.0, 0.5):
            recipe = Recipe.from_tables(TABLES | {"method": {"name": "cosim", "t_gain": gain}}, "a test")
            networks = build_roles(recipe, source)
            assert networks["auxiliary"].network.second_time.gain == gain
            assert not networks["generator"].two_time
