"""Signals beside the turns: the gain of the second time in every line, and what needs passes of its own in some."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from edmdistill.draws import Draws
from edmdistill.methods.base import Batch, NoiseRange
from edmdistill.methods.cosim import CoSIM, CoSIMConfig
from edmdistill.methods.sid import SiD
from edmdistill.training.run import Run
from edmdistill.training.watch import ROUNDS, signals


def test_cosims_sensitivity_by_hand():
    """F_psi = t at all pixels, F* = 0: |t - t_max|^2 over |t|^2, summed over the jumps from below t_max."""
    noise = NoiseRange(0.5, 0.002, 80.0)
    seen: dict[str, torch.Tensor] = {}

    def auxiliary(x, s, labels, t):
        seen.setdefault("t", t)
        return t.float()[:, None, None, None].expand_as(x)

    networks = {"teacher": lambda x, *_: 0 * x, "generator": lambda x, *_: 0 * x, "auxiliary": auxiliary}
    method = CoSIM(CoSIMConfig(share_to_max=0.5), networks, noise)
    found = method.monitor(Batch(torch.zeros(16, 1, 2, 2), None), Draws([0], 16))
    last = math.atan(80 / 0.5)
    below = [t for t in seen["t"].tolist() if t < last - 1e-9]
    assert 0 < len(below) < 16
    expected = math.sqrt(sum((t - last) ** 2 for t in below) / sum(t**2 for t in below))
    assert float(found["sensitivity/auxiliary"]) == pytest.approx(expected, rel=1e-5)


def test_an_auxiliary_score_that_ignores_t_has_none():
    noise = NoiseRange(0.5, 0.002, 80.0)
    networks = dict.fromkeys(("teacher", "generator"), lambda x, *_: 0 * x) | {"auxiliary": lambda x, *_: x}
    for share in (0.5, 1.0):  # of the second, no jump starts below t_max
        method = CoSIM(CoSIMConfig(share_to_max=share), networks, noise)
        found = method.monitor(Batch(torch.ones(4, 1, 2, 2), None), Draws([0], 4))
        assert float(found["sensitivity/auxiliary"]) == 0


def test_a_run_logs_them(whole: Callable[..., tuple[Run, Path]]):
    run, folder = whole("cosim")
    *others, last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    gain = run.networks["auxiliary"].network.second_time.gain.item()
    assert gain != 0
    assert last["gain/auxiliary"] == pytest.approx(gain)
    assert all("gain/auxiliary" in line and "sensitivity/auxiliary" not in line for line in others)
    assert 0 < last["sensitivity/auxiliary"] < 10


def test_a_method_without_a_second_time_has_none(whole: Callable[..., tuple[Run, Path]]):
    assert signals(whole("vsd")[0]) == {}
    assert SiD.monitor is not CoSIM.monitor


def test_passes_of_their_own_are_rare_and_leave_all_frozen(start: Callable[..., Run]):
    run = start("cosim")
    run.recipe = replace(run.recipe, training=replace(run.recipe.training, images=10**6))
    training, due = run.recipe.training, []
    for line in range(1, 400):
        run.images = line * training.log_every
        if "sensitivity/auxiliary" in signals(run):
            due.append(run.images // training.batch)
            assert not any(network.training for network in run.networks.values())
    assert due
    assert all(later - before >= ROUNDS for before, later in zip([0, *due], due, strict=False))
