"""A generator's file passes as a teacher's: at sigma_max the function shows what it is."""

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints import convert as module
from edmdistill.checkpoints import noise_dependence as measures
from edmdistill.checkpoints.config import unfinished
from edmdistill.checkpoints.convert import convert
from edmdistill.checkpoints.layout import CONFIG
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.noise_dependence import (
    GENERATOR_RANGE,
    describe_dependence,
    generator_warning,
    noise_dependence,
)
from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.cli import main
from edmdistill.embedded import EMBEDDED
from edmdistill.machine.engine import Machine
from edmdistill.networks import new_network
from edmdistill.networks.base import Conditioning
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM, VP
from edmdistill.recipes.library import load_recipe
from edmdistill.training.prepare import prepare

SIGMA, STD = 80.0, 0.5


def network(label_dim: int = 3) -> FlowNetwork:
    torch.manual_seed(0)
    small = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    return FlowNetwork(new_network("edm2", 16, 3, label_dim, **small), EDM())


def acting(gain: float, label_dim: int = 3) -> FlowNetwork:
    """A network whose raw output is `gain` times its input, which is of unit variance."""
    flow = network(label_dim)

    def raw(x: Tensor, *rest: object) -> tuple[Tensor]:
        return (gain * x,)

    flow.raw = raw  # type: ignore[method-assign, assignment]
    return flow


@pytest.mark.parametrize("label_dim", [0, 3, 10])
def test_a_denoiser_and_a_generator_of_gaussian_data(label_dim: int) -> None:
    """F = 0 is the denoiser of N(0, sigma_data^2), D = c_skip x; F = c_in x makes an image of it of any noise."""
    denoiser = noise_dependence(acting(0.0, label_dim))
    assert denoiser == pytest.approx(STD / SIGMA, rel=0.05)
    assert noise_dependence(acting(1.0, label_dim)) == pytest.approx(1 + STD / SIGMA, rel=0.05)
    assert denoiser < GENERATOR_RANGE[0] < 1 < GENERATOR_RANGE[1]


def test_what_all_noises_share_is_no_dependence() -> None:
    """An image for each class, whatever the noise; and what is measured is the network with its classes, as it was."""
    flow, images = network(), torch.randn(3, 3, 16, 16)

    def raw(x: Tensor, condition: Conditioning) -> tuple[Tensor]:
        assert condition.labels is not None
        return ((condition.labels @ images.flatten(1)).reshape(x.shape),)

    flow.raw = raw  # type: ignore[method-assign, assignment]
    assert noise_dependence(flow) == pytest.approx(STD / SIGMA, rel=0.05)
    assert flow.training


def test_the_words() -> None:
    for value, kind in ((0.01, "denoiser"), (0.8, "generator"), (170.0, "unlike a trained network")):
        assert kind in describe_dependence(value)
        assert (generator_warning(value, "teacher.pkl") is not None) == (kind == "generator")
    assert generator_warning(None, "teacher.pkl") is None
    assert "teacher.pkl" in str(generator_warning(0.8, "teacher.pkl"))


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_teachers_are_denoisers(name: str) -> None:
    assert noise_dependence(load_flow(EMBEDDED[name].teacher)[0]) < 0.4


def test_bfloat16_is_exact_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = load_flow(EMBEDDED["digits"].teacher)[0]
    monkeypatch.setattr(measures, "LARGE", 0)
    values = []
    for fast in (False, True):
        monkeypatch.setattr(measures, "multiplies_bfloat16", lambda fast=fast: fast)
        values.append(noise_dependence(flow))
    assert 0 < abs(values[0] - values[1]) < 0.01
    assert flow.compute_dtype is None


def test_a_denoiser_that_predicts_noise_is_not_taken_for_a_generator_by_its_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flow = FlowNetwork(network().network, VP())
    share = STD**2 / (STD**2 + SIGMA**2)
    # The network of the exact denoiser of N(0, STD^2), which is linear.
    noise = math.sqrt(SIGMA**2 + 1) * (1 - share) / SIGMA
    flow.network.forward = lambda x, condition: x * noise  # type: ignore[method-assign]
    monkeypatch.setattr(measures, "LARGE", 0)
    monkeypatch.setattr(measures, "multiplies_bfloat16", lambda: True)
    assert noise_dependence(flow) == pytest.approx(STD / SIGMA, rel=0.1)


def test_convert_measures_prints_and_stores_it(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(golden / "edm-tiny-cond.pkl")
    measured = convert(source, tmp_path / "own").config.noise_dependence
    assert measured == pytest.approx(noise_dependence(load_flow(source)[0]), rel=1e-4)
    assert load_checkpoint(tmp_path / "own")[1].noise_dependence == measured
    for value, warned in ((0.8, True), (0.1, False)):
        monkeypatch.setattr(module, "noise_dependence", lambda flow, value=value: value)
        result = CliRunner().invoke(main, ["convert", source, str(tmp_path / "out"), "--overwrite"])
        (tmp_path / "out" / CONFIG).unlink()
        (tmp_path / "out").rename(tmp_path / f"gone-{value}")
        assert result.exit_code == 0, result.output
        assert describe_dependence(value) in result.stdout
        assert ("behaves like a generator" in result.stderr) == warned


def test_a_checkpoint_says_it_for_whoever_takes_it_as_a_teacher(golden: Path, tmp_path: Path) -> None:
    flow, config = load_flow(golden / "edm-tiny-cond.pkl")
    save_checkpoint(tmp_path / "c", flow, replace(config, noise_dependence=0.9))
    assert generator_warning(load_checkpoint(tmp_path / "c")[1].noise_dependence, "c") is not None


def test_inspect_measures_when_it_is_asked(golden: Path) -> None:
    source = str(golden / "edm-tiny-cond.pkl")
    words = ["inspect", source, "--json"]
    assert "noise_dependence" not in json.loads(CliRunner().invoke(main, words).stdout)
    found = json.loads(CliRunner().invoke(main, [*words, "--check"]).stdout)
    assert found["noise_dependence"] == pytest.approx(noise_dependence(load_flow(source)[0]), rel=1e-4)
    assert found["function"] == describe_dependence(found["noise_dependence"])


def test_train_warns_and_hands_down_no_measure_of_the_teacher(tmp_path: Path) -> None:
    flow, config = load_flow(EMBEDDED["digits"].teacher)
    recipe = load_recipe("cosim/digits-quickstart", "cosim", ["training.images=64"])
    for value, warned in ((0.9, True), (0.1, False)):
        save_checkpoint(tmp_path / "c", flow, replace(config, noise_dependence=value), overwrite=True)
        run = prepare(recipe, data="digits", teacher=tmp_path / "c", machine=Machine("cpu"))
        assert any("behaves like a generator" in note for note in run.notes) == warned
        assert run.config.noise_dependence is None
        assert run.config.images_total == 64


def test_an_unfinished_generator_says_so() -> None:
    config = load_flow(EMBEDDED["digits"].teacher)[1]
    for seen, total, sentence in (
        (896, 80_000, "This generator is unfinished: 896 of 80,000 images seen."),
        *((80_000, 80_000, None), (80_032, 80_000, None), (896, None, None), (None, 80_000, None)),
    ):
        assert unfinished(replace(config, stage="generator", images_seen=seen, images_total=total)) == sentence


def test_a_teacher_that_is_adapted_to_read_t_is_still_a_teacher(tmp_path: Path) -> None:
    """Before its training goes on, its function is another one, which is no reason to warn."""
    plain = convert("digits", tmp_path / "plain").config.noise_dependence
    adapted = convert("digits", tmp_path / "adapted", time_embedding="positional").config.noise_dependence
    assert adapted == plain
    assert generator_warning(adapted, "digits") is None
