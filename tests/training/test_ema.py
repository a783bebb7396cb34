import json

import pytest
import torch
from torch import nn

from edmdistill.checkpoints.ema import find_snapshots, reconstruct_checkpoint
from edmdistill.checkpoints.store import load_checkpoint
from edmdistill.errors import RecipeError
from edmdistill.recipes import Recipe
from edmdistill.training.ema import Ema, HalfLife, PowerFunction
from edmdistill.training.loop import train


def test_closed_form():
    """Constant weights w after w0: the average is w + (w0 - w) 0.5^(images / half_life)."""
    network = nn.Linear(3, 2).double()
    start = [p.clone() for p in network.parameters()]
    ema = Ema(network, HalfLife(70, None))
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    for step in range(20):
        ema.update(network, 10 * step, 10)
    for average, now, then in zip(ema.network.parameters(), network.parameters(), start, strict=True):
        torch.testing.assert_close(average, now + (then - now) * 0.5 ** (200 / 70), rtol=1e-14, atol=0)


def test_ramp_up_shortens_the_half_life():
    ema = HalfLife(half_life_images=1000, rampup_ratio=0.05)
    assert ema.beta(0, 10) == 0  # the first step is taken whole
    assert ema.beta(2000, 100) == pytest.approx(0.5)  # half-life 100
    assert ema.beta(10**6, 1000) == pytest.approx(0.5)  # half-life 1000


def test_buffers_are_copied_and_the_network_is_left_alone():
    network = nn.BatchNorm1d(2)
    ema = Ema(network, HalfLife(100, None))
    network(torch.randn(8, 2))
    ema.update(network, 0, 10)
    assert torch.equal(ema.network.running_mean, network.running_mean)
    assert ema.network.num_batches_tracked == 1
    assert not ema.network.training
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in ema.network.parameters())


def test_the_official_traces(golden):
    """Three weights over 64 images a step, by the official classes in float32."""
    case = json.loads((golden / "edm2-extras.json").read_text())["ema_trace_float32"]
    batch, own = case["batch_size"], case["trad"]
    network = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([case["w0"]]))
    power = [Ema(network, PowerFunction(sigma_rel)) for sigma_rel in case["stds"]]
    half = Ema(network, HalfLife(round(own["halflife_Mimg"] * 1e6), own["rampup_ratio"]))
    for step in case["steps"]:
        with torch.no_grad():
            network.weight.copy_(torch.tensor([step["w"]]))
        seen = step["cur_nimg"] - batch
        for ema in power:
            ema.update(network, seen, batch)
        half.update(network, step["cur_nimg"], batch)  # EDM2's counts the step's own batch; EDM's, which ours is, not
        for ema, expected in zip([*power, half], [*step["power"], step["trad"]], strict=True):
            torch.testing.assert_close(ema.network.weight[0], torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({}, "no average is asked for: give half_life_images or sigma_rel"),
        ({"sigma_rel": [0.05, 0.05]}, "must be different numbers of three decimals at most"),
        ({"sigma_rel": [0.0512]}, "must be different numbers of three decimals at most"),
        ({"sigma_rel": [0.3]}, "expected `float` < 0.288"),
        ({"sigma_rel": [0.05], "snapshot_every": 8}, "give two or more of sigma_rel"),
    ],
)
def test_recipes_ask_for_what_there_is(recipe, table, sentence):
    tables = json.loads(recipe("sid").to_json()) | {"ema": table}
    with pytest.raises(RecipeError, match=sentence):
        Recipe.from_json(json.dumps(tables).encode())


def test_a_runs_averages_make_others(start, tmp_path):
    """With both lengths kept, one that was tracked is given back; and the run's first average is what it publishes."""
    options = {"images": 160, "snapshot_every": 40}
    run = start("sid", ema={"sigma_rel": [0.2, 0.1], "snapshot_every": 40}, **options)

    def interrupt(images, measures):
        if images == 104:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", on_round=interrupt)
    run = start("sid", ema={"sigma_rel": [0.2, 0.1], "snapshot_every": 40}, **options)
    assert train(run, tmp_path / "run", note=lambda sentence: None).finished
    found = find_snapshots(tmp_path / "run")
    assert sorted(found) == [(images, length) for images in (40, 80, 120, 160) for length in (0.1, 0.2)]
    _, config = load_checkpoint(tmp_path / "run/generator")
    assert config.ema == {"sigma_rel": 0.2}
    for average in run.averages:
        made = reconstruct_checkpoint(tmp_path / "run", tmp_path / average.profile.name, average.profile.sigma_rel)
        assert (made.stage, made.method, made.images_seen) == ("generator", "sid", 160)
        flow, _ = load_checkpoint(tmp_path / average.profile.name)
        for name, tensor in average.network.network.state_dict().items():
            torch.testing.assert_close(flow.network.state_dict()[name], tensor, rtol=2e-3, atol=1e-3, msg=name)
