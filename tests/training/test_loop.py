import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file
from script_files import Gap, Maps, script
from toy_runs import ALL_METHODS

from edmdistill.errors import TrainingError
from edmdistill.machine.engine import Machine
from edmdistill.methods import METHODS
from edmdistill.methods.base import Loss
from edmdistill.networks.magnitude import MPConv
from edmdistill.recipes.schema import Recipe, TrainingTable
from edmdistill.training.loop import requests, rounds
from edmdistill.training.loss_scale import LossScale
from edmdistill.training.monitors import Diverged, fingerprints
from edmdistill.training.optimizers import learning_rate
from edmdistill.training.prepare import prepare
from edmdistill.training.session import train

OFFLOADS = "ema", "teacher", "optimizer"


@pytest.mark.parametrize("method", ALL_METHODS)
def test_three_rounds_move_the_players_and_nobody_else(method, start):
    run = start(method)
    before = fingerprints(run.networks | {"ema": run.ema.network})
    measured = list(rounds(run))
    after = fingerprints(run.networks | {"ema": run.ema.network})
    trained = {role for role, part in METHODS[method].load().roles.items() if part.trained}
    followers = {role for role, part in METHODS[method].load().roles.items() if part.ema_of}
    assert {role for role in before if before[role] != after[role]} == trained | followers | {"ema"}
    assert len(measured) == 3
    assert run.images == 24
    for measures in measured:
        assert {f"loss/{role}" for role in trained} <= measures.keys()
        assert all(map(math.isfinite, measures.values()))


def test_ctm_learns_by_networks_of_files_and_goes_on(recipe, teacher, tmp_path):
    gap = script(Gap(), tmp_path / "gap.pt", *torch.zeros(2, 1, 3, 8, 8))
    maps = script(Maps(), tmp_path / "maps.pt", torch.zeros(1, 3, 224, 224))
    tables = json.loads(recipe("ctm").to_json())
    tables["method"] |= {"distance": "lpips", "lpips": gap, "features": [maps]}
    made = Recipe.from_json(json.dumps(tables).encode())

    def interrupt(images, measures):
        if images == 8:
            signal.raise_signal(signal.SIGINT)

    for reached in ((False, 8), (True, 24)):  # what interrupts does so once
        run = prepare(made, data="digits", teacher=teacher, machine=Machine("cpu"))
        assert train(run, tmp_path / "run", on_round=interrupt) == reached
    stated = load_file(tmp_path / "run" / "state" / "000000000024" / "features.safetensors")
    assert "weights.networks.0.script.layer.weight" in stated


def test_a_finished_run_stays_as_it_is(start, tmp_path):
    train(start("sid"), tmp_path / "run")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    files.pop(tmp_path / "run/.lock")
    assert train(start("sid"), tmp_path / "run") == (True, 24)
    assert all(path.stat().st_mtime_ns == then for path, then in files.items())


def test_the_generator_says_where_it_comes_from(start, teacher, tmp_path):
    run = start("cosim")
    train(run, tmp_path / "run")
    config = json.loads((tmp_path / "run/generator/config.json").read_text())
    assert (config["stage"], config["method"], config["images_seen"]) == ("generator", "cosim", 24)
    assert config["recipe_hash"] == run.recipe.hash
    assert config["provenance"]["licence"] == "cc-by-nc-sa-4.0"
    assert config["provenance"]["parent"] == run.identity["teacher_sha256"]
    assert not config["two_time"]
    assert config["label_names"] == [str(digit) for digit in range(10)]


def test_the_average_is_what_is_published(start, tmp_path):
    run = start("sid")
    train(run, tmp_path / "run")
    saved = load_file(tmp_path / "run/generator/model.safetensors")
    averages = run.ema.network.network.state_dict()
    assert all(torch.equal(saved[name], averages[name]) for name in saved)
    weights = run.networks["generator"].network.state_dict()
    assert any(not torch.equal(saved[name], weights[name]) for name in saved)


def test_turns_draw_their_own_batches(start):
    """Over a run the stream is read once from end to end, whatever the number of turns, and on from anywhere."""
    run = start("cosim")
    turns = run.method.turns()
    positions = list(requests(run, turns))
    assert positions == [(start, start + 8) for start in range(0, 3 * 2 * 8, 8)]
    run.images = 16
    assert list(requests(run, turns)) == positions[-2:]
    run.images = 0
    later = [turns[0]._replace(begins=16), turns[1]]
    assert list(requests(run, later)) == [*positions[1:4:2], *positions[4:]]


@pytest.mark.parametrize("role", ["auxiliary", "generator"])
def test_a_nan_names_its_place_and_the_last_good_state(role, start, tmp_path, monkeypatch):
    method, name = METHODS["cosim"].load(), f"{role}_loss"
    healthy = getattr(method, name)

    def poisoned(self, batch, rng):
        loss = healthy(self, batch, rng)
        bad = torch.arange(8) < (2 if run.images == 32 else 0)
        return Loss(torch.where(bad, math.nan, 1.0) * loss.value, loss.t, loss.signals)

    run = start("cosim", images=80, snapshot_every=24)
    monkeypatch.setattr(method, name, poisoned)
    with pytest.raises(TrainingError) as error:
        train(run, tmp_path / "run")
    sentence = str(error.value)
    assert f"the {role}'s turn after 32 images" in sentence
    assert "2 of 8 samples, at sigma " in sentence
    assert f"gradient of {role}.network." in sentence
    assert "float32" in sentence
    assert str(tmp_path / "run/state/000000000024") in sentence
    assert "\n" not in sentence


def test_a_nan_in_the_weights_is_told_from_one_in_the_gradient(start):
    run = start("sid", images=80)
    steps = rounds(run)
    next(steps)
    with torch.no_grad():
        run.networks["teacher"].network.out_conv.weight.fill_(math.inf)
    with pytest.raises(Diverged, match=r"weights teacher\.network\.out_conv\.weight \(float32\)"):
        next(steps)


def test_a_network_that_does_not_move_is_an_error(start):
    with pytest.raises(TrainingError, match="first turn of the auxiliary moved no network"):
        next(rounds(start("sid", lr=1e-30)))


def test_gradient_clipping_bounds_the_step(start):
    """Adam forgets a gradient's scale but for its eps: with a large one, the clipped step is the smaller."""
    steps = []
    for clip in None, 1e-3:
        run = start("diffusion", eps=1.0, grad_clip=clip, images=8)
        next(rounds(run))
        steps.append(abs(float(run.networks["teacher"].network.out_gain.detach())))  # from 0
    assert 0 < steps[1] <= 1e-2 * 1e-3 < steps[0]


def test_clipping_leaves_smaller_gradients_as_they_are(start):
    unclipped, clipped = (start("diffusion", eps=1.0, grad_clip=clip, images=16) for clip in (None, 1e6))
    assert list(rounds(clipped)) == list(rounds(unclipped))
    assert fingerprints(clipped.networks) == fingerprints(unclipped.networks)


@pytest.mark.parametrize("method", ["sid", "ctm"])  # the latter takes its turn's gradients beforehand, too
def test_micro_batches_count_by_their_rows(method, start):
    """Of 2, 3 and 3 rows: loss, gradients and their balance are those of the whole batch."""
    whole, parts = (next(rounds(start(method, Machine("cpu", size), images=8))) for size in (None, 3))
    assert parts.keys() == whole.keys()
    del whole["diversity"], parts["diversity"]  # of a micro-batch
    assert parts == pytest.approx(whole, rel=1e-3)


def test_learning_rates():
    def training(**values):
        return TrainingTable(images=1000, batch=10, lr=2.0, log_every=1, snapshot_every=1, **values)

    assert learning_rate(training(), "generator", 990) == 2
    assert learning_rate(training(lr_by_role={"auxiliary": 3.0}), "auxiliary", 0) == 3
    assert learning_rate(training(lr_rampup_images=100), "generator", 0) == pytest.approx(0.2)
    assert learning_rate(training(lr_rampup_images=100), "generator", 500) == 2
    linear = training(lr_decay="linear", decay_share=0.5)
    assert [learning_rate(linear, "generator", images) for images in (0, 500, 750, 1000)] == [2, 2, 1, 0]
    root = training(lr_decay="inverse_sqrt", decay_images=100)
    assert [learning_rate(root, "generator", images) for images in (0, 100, 400)] == [2, 2, 1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_float32_weights(precision, start):
    run = start("cosim", precision=precision)
    for scale in run.scales.values():
        scale.scale = 2.0**8  # no step overflows
    measured = list(rounds(run))
    assert all(math.isfinite(value) for measures in measured for value in measures.values())
    trained = [run.networks[role] for role in ("generator", "auxiliary")]
    assert {p.dtype for network in trained for p in network.parameters()} == {torch.float32}
    wide = list(rounds(start("cosim")))
    assert measured != wide
    assert [m["loss/auxiliary"] for m in measured] == pytest.approx([m["loss/auxiliary"] for m in wide], rel=0.05)


def test_the_loss_scale_is_gone_before_clipping(start):
    """In float32, where a power of two changes no bit: neither of norms nor of steps, in pieces or not."""
    for pieces in (1, 2):
        runs = []
        for scale in (1.0, 2.0**10):
            run = start("sid", Machine(device="cpu", loss_pieces=pieces), eps=1.0, grad_clip=0.1, images=16)
            run.scales = {role: LossScale(scale) for role in ("generator", "auxiliary")}
            measured = [(m["grad_norm/auxiliary"], m["grad_norm/generator"]) for m in rounds(run)]
            assert min(norm for norm, _ in measured) > 0.1
            assert run.method.pieces.scale == scale / 8  # of a row's loss
            runs.append((measured, fingerprints(run.networks)))
        assert runs[0] == runs[1]


def test_a_step_ends_with_weights_of_unit_size(start):
    run = start("sid", images=8)
    next(rounds(run))
    for role in ("generator", "auxiliary"):
        weights = [layer.weight for layer in run.networks[role].modules() if isinstance(layer, MPConv)]
        assert weights
        for weight in weights:
            rms = weight.detach().square().flatten(1).mean(1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=0, atol=1e-3)


def test_a_target_network_follows_by_its_decay(start):
    run = start("ctm", images=8)
    before = {name: p.detach().clone() for name, p in run.networks["generator"].named_parameters()}
    next(rounds(run))
    after, target = (dict(run.networks[role].named_parameters()) for role in ("generator", "target"))
    assert max(float((after[name].detach() - before[name]).abs().max()) for name in before) > 1e-3
    for name, weight in before.items():
        torch.testing.assert_close(target[name], 0.999 * weight + 0.001 * after[name].detach(), rtol=1e-6, atol=1e-7)


def test_a_step_that_overflows_is_left_out_and_the_loss_scale_falls(start, tmp_path):
    """The gradient in float16 is at most 65504; the scale is halved until it fits, and is part of the state."""
    run = start("sid", precision="fp16", images=48)
    for scale in run.scales.values():
        scale.scale = 2.0**40
    before = fingerprints(run.networks)
    steps = rounds(run)
    measures = next(steps)
    assert fingerprints(run.networks) == before
    assert measures["loss_scale/generator"] == 2.0**39
    assert "grad_norm/generator" not in measures  # no number: the lines' means and the health's norms go without it
    assert all(math.isfinite(value) for value in measures.values())
    assert train(run, tmp_path / "run").finished
    resumed = start("sid", precision="fp16", images=48)
    train(resumed, tmp_path / "run")
    assert {role: scale.state() for role, scale in resumed.scales.items()} == {
        role: scale.state() for role, scale in run.scales.items()
    }
    assert run.scales["generator"].scale == 2.0**34


def test_where_things_wait_changes_nothing(start, monkeypatch):
    """Teacher, average and optimizer in the host's memory, and activations computed twice: the same run, bitwise.

    Normalizing weights in every pass, as activation checkpointing does, is the same but for rounding.
    """
    monkeypatch.setattr(Machine, "shares_weights", True)
    plain, spare = start("cosim"), start("cosim", machine=Machine("cpu", None, False, OFFLOADS, checkpointing=True))
    assert list(rounds(plain)) == list(rounds(spare))
    for group, tensors in plain.state().items():
        for name, tensor in spare.state()[group].items():
            assert torch.equal(tensor, tensors[name]), f"{group} {name}"
