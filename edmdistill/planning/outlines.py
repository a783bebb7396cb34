"""The shapes of the networks of a plan, on the meta device: no weights are read."""

from __future__ import annotations

import torch

from edmdistill.checkpoints.load import outline
from edmdistill.data.datasets import open_dataset
from edmdistill.errors import RecipeError
from edmdistill.networks import new_network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.published import PUBLISHED
from edmdistill.recipes.schema import Recipe
from edmdistill.training.sources import sketch


def outline_teacher(recipe: Recipe, teacher: str | None, network: str | None, data: str | None) -> FlowNetwork:
    """Returns the teacher, or the network that a recipe without one makes.

    Args:
        teacher: a checkpoint.
        network: the name of a published network, if there is no checkpoint.
        data: a data set, for a recipe that makes its network.
    Raises: RecipeError: none of them gives the shape.  CheckpointError, DatasetError: from what is opened.
    """
    if teacher is not None and network is not None:
        raise RecipeError(f"TEACHER and --network both give the teacher's shape, as {teacher} and {network}: give one")
    if data is not None and (recipe.network is None or teacher is not None or network is not None):
        raise RecipeError("--data gives the shape of a network that the recipe makes, and none is made: leave it out")
    if teacher is not None:
        return outline(teacher)
    if network is not None and network not in PUBLISHED:
        raise RecipeError(
            f"there is no network {network!r}: choose one of {', '.join(sorted(PUBLISHED))}, or a checkpoint"
        )
    if network is not None:
        return _published(network)
    if recipe.network is None:
        raise RecipeError("the plan needs the teacher's shape: name a checkpoint, or --network edm2-img512-s")
    if data is None:
        raise RecipeError("this recipe makes its network for the data: name it with --data")
    return sketch(recipe.network, open_dataset(data, split=recipe.data.split))


def outline_guide(guide: str | None) -> FlowNetwork | None:
    """Returns the guide, from a checkpoint or the name of a published network."""
    return None if guide is None else _published(guide) if guide in PUBLISHED else outline(guide)


def _published(name: str) -> FlowNetwork:
    kind, shape, arguments = PUBLISHED[name]
    with torch.device("meta"):
        return FlowNetwork(new_network(kind, *shape, **arguments), EDM())
