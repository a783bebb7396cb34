import pytest
import torch
from msgspec.structs import replace
from torch import nn

from edmdistill.errors import TrainingError
from edmdistill.methods.base import Loss
from edmdistill.training import monitors
from edmdistill.training.monitors import (
    Diverged,
    Health,
    find_divergence,
    fingerprints,
    require_finite,
    require_moved,
)
from edmdistill.training.session import train


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
    with pytest.raises(TrainingError, match="moved generator and teacher instead of the generator alone"):
        require_moved("generator", before, {"generator": 2, "auxiliary": 1, "teacher": 2})


def test_weights_must_be_finite():
    network = nn.Linear(2, 2)
    require_finite({"generator": network}, 8)
    with torch.no_grad():
        network.bias[1] = torch.inf
    with pytest.raises(Diverged, match=r"after 8 images the weights generator\.bias \(float32\) are not finite"):
        require_finite({"generator": network}, 8)


def test_a_gradient_without_a_bad_number_here_is_not_named():
    """Its norm may overflow, it may be another process's shard, or none may come of a loss that is not finite."""
    network = nn.Linear(2, 2)
    network.weight.grad = torch.full((2, 2), 1e38)
    error = find_divergence("generator", Loss(torch.ones(2), torch.ones(2)), {"generator": network}, 8)
    assert str(error) == "the generator's turn after 8 images gave no finite number: the gradient, though not the loss"


def line(images: int, *, diversity: float = 0.8, mean: float = 0.0, std: float = 1.0, norm: float = 1.0) -> dict:
    """A line of metrics.jsonl; mean and deviation are in units of the data, whose own are 1/4 and 1/2."""
    generated = {"generated/mean/0": 0.25 + 0.5 * mean, "generated/std/0": 0.5 * std}
    data = {"data/mean/0": 0.25, "data/std/0": 0.5}
    return {"images": images, "diversity": diversity, "grad_norm/generator": norm} | generated | data


@pytest.mark.parametrize(
    ("ill", "kind", "sentence"),
    [
        ({"diversity": 0.2}, "collapse", "the generated images vary 0.20 times as much as the data"),
        ({"std": 2.5}, "saturation", "channel 0 of the generated images has 2.5 times the data's standard deviation"),
        ({"std": 0.4}, "saturation", "has 0.4 times the data's standard deviation"),
        ({"mean": -0.7}, "saturation", "and its mean is 0.7 such deviations below the data's: the generator runs away"),
        ({"norm": 50.0}, "runaway", "the gradient of the generator is 50 times as large as it was"),
    ],
)
def test_an_illness_that_lasts_is_told_once_an_episode(ill, kind, sentence):
    health = Health()
    assert [alarm for images in range(6) for alarm in health.check(line(images))] == []
    assert health.check(line(1000, **ill)) == []  # one line may be chance
    (alarm,) = health.check(line(2000, **ill))
    assert alarm.kind == kind
    assert alarm.sentence.startswith("After 2,000 images ")
    assert sentence in alarm.sentence
    assert [alarm.begins for alarm in health.check(line(3000, **ill))] == [False]
    assert health.check(line(4000)) == []
    assert [bool(health.check(line(images, **ill))) for images in (5000, 6000)] == [False, True]


@pytest.mark.parametrize(
    "well", [{"diversity": 0.26}, {"std": 0.55, "mean": 0.45}, {"std": 1.9, "mean": -0.45}, {"norm": 19}]
)
def test_what_is_short_of_an_illness_is_healthy(well):
    health = Health()
    assert [alarm for images in range(6) for alarm in health.check(line(images))] == []
    assert [alarm for images in range(6, 12) for alarm in health.check(line(images, **well))] == []
    assert health.last_healthy == 11


def test_gradients_are_compared_with_those_of_five_healthy_lines_or_more():
    early, late = Health(), Health()
    assert [early.check(line(images, norm=norm)) for images, norm in enumerate((1.0, 1.0, 50.0, 50.0))] == [[]] * 4
    for images in range(5):
        late.check(line(images))
    for images in range(5, 30):  # an illness of many lines does not become the usual
        alarms = late.check(line(images, norm=50.0))
    assert "50 times as large as it was" in alarms[0].sentence
    assert late.last_healthy == 4


def test_gradients_that_are_still_0_are_no_measure_of_others():
    """As those of CoSIM's generator in fp16, until its auxiliary score has taken a step."""
    health = Health()
    assert [alarm for images in range(9) for alarm in health.check(line(images, norm=0.0))] == []
    assert [alarm for images in range(9, 15) for alarm in health.check(line(images))] == []
    health.check(line(15, norm=50.0))
    assert [alarm.kind for alarm in health.check(line(16, norm=50.0))] == ["runaway"]
    stated = health.begin_interval()
    resumed = Health(replace(stated, norms={name: [0.0] * 20 for name in stated.norms}))  # of an earlier version
    assert resumed.check(line(17, norm=1.0)) == []


def test_what_a_method_does_not_measure_is_not_judged():
    health = Health()
    assert [alarm for images in range(9) for alarm in health.check({"images": images, "loss/teacher": 1e9})] == []


def test_an_alarm_that_was_asked_for_ends_the_run(start, tmp_path, monkeypatch):
    monkeypatch.setattr(monitors, "LEAST_DIVERSITY", 1e9)
    heard = []
    run = start("cosim", images=240, log_every=16, snapshot_every=16)
    with pytest.raises(
        TrainingError,
        match=r"collapses; .*; no state before it was healthy, though .* is finite",
    ):
        train(run, tmp_path / "run", stop_on={"collapse"}, on_message=heard.append)
    told = start("cosim", images=48, log_every=16, snapshot_every=240)
    assert train(told, tmp_path / "told", on_message=heard.append).finished
    assert len([sentence for sentence in heard if "collapses" in sentence]) == 1  # the first run's is its error
