"""training.images may grow, and nothing is recomputed: where no schedule depends on the total."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edmdistill.errors import TrainingError
from edmdistill.training.run import Run
from edmdistill.training.run_dir import open_run
from edmdistill.training.session import train

CASES = [
    ({}, 40, None),
    ({"lr_decay": "inverse_sqrt", "decay_images": 16}, 40, None),
    ({}, 16, "training.images: 24 there, 16 now; it may only grow"),
    ({"lr_decay": "linear"}, 40, 'it may not change, because training.lr_decay = "linear" depends on it'),
    ({"lr_decay": "linear"}, 16, 'it may not change, because training.lr_decay = "linear" depends on it'),
]


@pytest.mark.parametrize(("options", "images", "sentence"), CASES)
def test_what_the_total_may_become(options, images, sentence, recipe, tmp_path: Path):
    before, after = (recipe("sid", images=total, **options) for total in (24, images))
    with open_run(tmp_path / "run", before.to_json(), {"data": {}}, ""):
        pass
    resolved = tmp_path / "run/recipe.resolved.json"
    if sentence is None:
        with open_run(tmp_path / "run", after.to_json(), {"data": {}}, ""):
            pass
        assert json.loads(resolved.read_text())["training"]["images"] == images
    else:
        with pytest.raises(TrainingError) as error, open_run(tmp_path / "run", after.to_json(), {"data": {}}, ""):
            pass
        assert str(error.value).splitlines()[1].endswith(sentence)
        assert resolved.read_bytes() == before.to_json()


def test_a_run_that_grew_is_the_longer_run(start: Callable[..., Run], tmp_path: Path):
    whole = start("sid", images=40)
    train(whole, tmp_path / "whole", on_message=str)
    heard: list[str] = []
    assert train(start("sid", images=20), tmp_path / "grown", on_message=str) == (True, 24)  # the last batch is whole
    grown = start("sid", images=40)
    assert train(grown, tmp_path / "grown", on_message=heard.append) == (True, 40)
    assert heard == ["Going on after 24 images."]
    for group, tensors in whole.state().items():
        for name, tensor in grown.state()[group].items():
            assert torch.equal(tensor, tensors[name]), f"{group} {name}"
