"""What a method's author may get wrong in a loss is said before a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import TABLES

from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.methods.base import Batch, Loss
from edmdistill.methods.ect import ECT
from edmdistill.recipes.schema import Recipe
from edmdistill.training.prepare import prepare
from edmdistill.training.probe import require_loss


def loss(**changes: Any) -> Loss:
    good = Loss(torch.ones(3, requires_grad=True), torch.ones(3), {"distance": torch.ones(())})
    return good._replace(**changes)


def test_a_loss_as_it_should_be() -> None:
    require_loss(loss(), 3, "here")
    require_loss(loss(signals={}, generated=torch.ones(3, 1, 2, 2)), 3, "here")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"value": torch.ones((), requires_grad=True)}, r"value of 3 samples is \[\], but must be a number for each"),
        (
            {"value": torch.ones(3, 1, 2, 2, requires_grad=True)},
            r"value of 3 samples is \[3, 1, 2, 2\], but must be a n",
        ),
        ({"t": torch.ones(1)}, r"t of 3 samples is \[1\], but must be a number for each sample"),
        ({"t": 1.0}, "t of 3 samples is float, but"),
        ({"signals": {"distance": 1.0}}, r"signals\['distance'\] of 3 samples is float, but must be a mean over"),
        ({"signals": {"distance": torch.ones(3)}}, r"\] of 3 samples is \[3\], but must be a mean over"),
        ({"value": torch.ones(3)}, "the loss does not depend on the network that it trains"),
    ],
    ids=["mean", "map", "one-t", "float-t", "float-signal", "vector-signal", "detached"],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainingError, match=f"^here: .*{sentence}"):
        require_loss(loss(**changes), 3, "here")


def test_a_run_is_refused_before_it_begins(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: ECT, batch: Batch, draws: Any) -> Any:
        return torch.zeros(())

    monkeypatch.setattr(ECT, "consistency_loss", careless)
    recipe = Recipe.from_tables(TABLES | {"method": {"name": "ect", "c": 0.7}}, "a test")
    with pytest.raises(
        TrainingError, match=r"^ECT, the turn of generator: the loss is a Tensor: return a Loss of value"
    ):
        prepare(recipe, data="digits", teacher=teacher, machine=Machine(device="cpu"))
