import json
import re

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from edmdistill.checkpoints.posthoc_ema import find_snapshots, reconstruct_checkpoint
from edmdistill.checkpoints.store import load_checkpoint, load_tensors
from edmdistill.cli import main
from edmdistill.errors import RecipeError
from edmdistill.recipes.library import load_recipe
from edmdistill.recipes.schema import Recipe
from edmdistill.training import ema as ema_module
from edmdistill.training import session
from edmdistill.training.ema import Ema, HalfLife, PowerFunction, profiles, update_average
from edmdistill.training.session import train


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


def test_a_recipe_can_leave_the_ramp_up_out():
    recipe = load_recipe("sid/digits", sets=['ema.rampup_ratio="none"', "ema.half_life_images=50"])
    assert profiles(recipe.ema) == [HalfLife(50, None)]
    assert HalfLife(50, None).beta(0, 50) == 0.5


def test_the_first_average_is_the_half_life_s_and_each_has_its_name(recipe):
    tables = json.loads(recipe("sid").to_json()) | {"ema": {"half_life_images": 50, "sigma_rel": [0.101, 0.104]}}
    made = profiles(Recipe.from_json(json.dumps(tables).encode()).ema)
    assert made == [HalfLife(50, 0.05), PowerFunction(0.101), PowerFunction(0.104)]
    assert [profile.name for profile in made] == ["half-life", "sigma-rel-0.101", "sigma-rel-0.104"]


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


def test_tensors_that_come_down_one_at_a_time_go_where_all_at_once_do(monkeypatch):
    """Weights and buffers, as from a GPU whose tensors fill the staging memory."""
    network, averages = nn.BatchNorm1d(2), []
    nn.init.constant_(network.weight, 5.0)
    network(torch.arange(16.0).reshape(8, 2))
    for pieces in (False, True):
        if pieces:
            monkeypatch.setattr(ema_module, "staged", lambda tensors: ((i, [one]) for i, one in enumerate(tensors)))
        averages.append(nn.BatchNorm1d(2))
        update_average(averages[-1], network, 0.25)
    whole, one_by_one = (average.state_dict() for average in averages)
    assert all(torch.equal(one_by_one[name], tensor) for name, tensor in whole.items())
    assert whole["weight"].tolist() == [4, 4]
    assert whole["running_mean"].equal(network.running_mean)


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
        ({}, "there is no average: set half_life_images or sigma_rel"),
        ({"sigma_rel": [0.05, 0.05]}, "must be different numbers with at most three decimals"),
        ({"sigma_rel": [0.0512]}, "must be different numbers with at most three decimals"),
        ({"sigma_rel": [0.3]}, "each of its values must be below 0.288"),
        ({"sigma_rel": [0.05], "snapshot_every": 8}, "set two or more sigma_rel"),
    ],
)
def test_recipes_ask_for_what_there_is(recipe, table, sentence):
    tables = json.loads(recipe("sid").to_json()) | {"ema": table}
    with pytest.raises(RecipeError, match=sentence):
        Recipe.from_json(json.dumps(tables).encode())


KEPT = {"half_life_images": 50, "sigma_rel": [0.2, 0.1], "snapshot_every": 16}


@pytest.fixture(scope="module")
def begin(start):
    """A run that keeps averages more often than states, before its first step; begin(ema=...): another [ema]."""
    return lambda ema=KEPT: start("diffusion", ema=ema, images=160, snapshot_every=40)


@pytest.fixture(scope="module")
def kept(begin, tmp_path_factory):
    """The finished run, and its directory."""
    run, run_dir = begin(), tmp_path_factory.mktemp("kept") / "run"
    assert train(run, run_dir).finished
    return run, run_dir


def averages(run_dir):
    """The files by name."""
    return {path.name: path.read_bytes() for path in (run_dir / "ema").iterdir()}


def test_what_a_run_keeps(kept):
    """float16, but for the buffers; the last are the averages themselves."""
    run, run_dir = kept
    moments = *range(16, 160, 16), 160
    assert sorted(find_snapshots(run_dir)) == [(images, length) for images in moments for length in (0.1, 0.2)]
    for average in run.averages[1:]:
        length = average.profile.sigma_rel
        tensors, about = load_tensors(run_dir / f"ema/000000000160-{length:.3f}.safetensors")
        assert json.loads(about["average"]) == {"images": 160, "sigma_rel": length}
        network = average.network.network
        buffers = {name for name, _ in network.named_buffers()}
        assert {name for name, tensor in tensors.items() if tensor.dtype == torch.float32} == buffers
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensors[name], tensor if name in buffers else tensor.half()), name


@pytest.mark.parametrize("stage", ["between states", "after a state"])
def test_killed_and_resumed_it_keeps_the_same(stage, kept, begin, tmp_path, monkeypatch):
    """Killed with averages beyond the last state, and between the state and whatever would come after it."""
    save = session.save_state

    def die_after(folder, state, *numbers):
        save(folder, state, *numbers)
        if stage == "after a state" and state.progress.images == 80:
            raise KeyboardInterrupt

    def die_at(images, measures):
        if images == 120:
            raise KeyboardInterrupt

    monkeypatch.setattr(session, "save_state", die_after)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(begin(), broken, on_round=die_at)
    assert max(averages(broken)).startswith("000000000112" if stage == "between states" else "000000000080")
    monkeypatch.undo()
    assert train(begin(), broken, on_message=lambda sentence: None).finished
    assert averages(broken) == averages(kept[1])


def test_a_runs_averages_make_others(kept, tmp_path):
    """A length that was tracked is given back, at a moment in between too; generator/ has the run's first average."""
    run, run_dir = kept
    assert load_checkpoint(run_dir / "generator")[1].ema == {"half_life_images": 50, "rampup_ratio": 0.05}
    names = sorted(averages(run_dir))
    for length, images in ((0.1, 160), (0.2, 160), (0.1, 80)):
        out = tmp_path / f"{length}-{images}"
        made = reconstruct_checkpoint(run_dir, out, length, images)
        assert (made.stage, made.method, made.images_seen) == ("teacher", "diffusion", images)
        assert made.recipe_hash == run.recipe.hash
        assert made.ema == {
            "sigma_rel": length,
            "images": images,
            "misfit": pytest.approx(0, abs=1e-6),
            "from": [name for name in names if int(name[:12]) <= images],
        }
        found = load_checkpoint(out)[0].network.state_dict()
        stored = load_tensors(run_dir / f"ema/{images:012d}-{length:.3f}.safetensors")[0]
        for name, tensor in stored.items():
            torch.testing.assert_close(found[name], tensor.float(), rtol=1e-6, atol=1e-6, msg=name)


def test_the_command_makes_what_a_run_had_tracked(kept, begin, tmp_path):
    """A length between those that were kept, against a run that tracked it."""
    _, run_dir = kept
    train(begin({"sigma_rel": [0.15]}), tmp_path / "other")
    assert load_checkpoint(tmp_path / "other/generator")[1].ema == {"sigma_rel": 0.15}
    words = ["ema", str(run_dir), "--sigma-rel", "0.15", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"the teacher with sigma_rel 0\.15 after 160 images, from 20 averages, .* within \d\.", result.stdout
    )

    def weights(folder):
        flow, _ = load_checkpoint(folder)
        return torch.cat([p.detach().flatten() for p in flow.network.parameters()])

    tracked, found, plain = map(weights, (tmp_path / "other/generator", tmp_path / "out", run_dir / "generator"))
    assert float((found - tracked).norm()) < 0.05 * float((plain - tracked).norm())


@pytest.mark.gpu
def test_an_average_in_the_hosts_memory():
    """Of a network on a GPU: what it would be beside it, up to rounding."""
    torch.manual_seed(0)
    network = nn.Linear(64, 64).cuda()
    here, there = Ema(network, PowerFunction(0.1)), Ema(network, PowerFunction(0.1))
    there.network.cpu()
    for step in range(10):
        with torch.no_grad():
            network.weight.add_(torch.randn_like(network.weight))
        for ema in (here, there):
            ema.update(network, 8 * step, 8)
    assert there.network.weight.device.type == "cpu"
    torch.testing.assert_close(there.network.weight, here.network.weight.cpu())
