import pytest
import torch
from torch import nn

from edmdistill.errors import TrainingError
from edmdistill.training.monitors import Diverged, fingerprints, require_finite, require_moved


def test_a_fingerprint_sees_a_single_bit():
    networks = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4).double()}
    before = fingerprints(networks)
    assert fingerprints(networks) == before
    with torch.no_grad():
        weight = networks["a"].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1e9))
    assert fingerprints(networks)["a"] != before["a"]
    assert fingerprints(networks)["b"] == before["b"]


def test_only_the_role_whose_turn_it_is_may_move():
    before = {"generator": 1, "auxiliary": 1, "teacher": 1}
    require_moved("generator", before, before | {"generator": 2})
    with pytest.raises(TrainingError, match="moved no network"):
        require_moved("generator", before, before)
    with pytest.raises(TrainingError, match="moved auxiliary and teacher instead of the generator alone"):
        require_moved("generator", before, {"generator": 1, "auxiliary": 2, "teacher": 2})


def test_weights_must_be_finite():
    network = nn.Linear(2, 2)
    require_finite({"generator": network}, 8)
    with torch.no_grad():
        network.bias[1] = torch.inf
    with pytest.raises(Diverged, match=r"after 8 images the weights generator\.bias \(float32\) are not finite"):
        require_finite({"generator": network}, 8)
