"""The loss of teachers by noise level."""

import json
import math

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.data.datasets import open_dataset
from edmdistill.embedded import EMBEDDED
from edmdistill.errors import CheckpointError, DatasetError, NotFiniteError
from edmdistill.evaluation.noise_levels import SIGMAS, losses_by_noise, table, verdict
from edmdistill.evaluation.noise_levels import NoiseLevelLoss as Row
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM


def test_a_teacher_is_as_good_as_itself(teacher):
    rows = losses_by_noise([teacher, teacher], "digits", images=30, batch=7)
    assert [row.sigma for row in rows] == list(SIGMAS)
    assert all(row.losses[0] == row.losses[1] > 0 for row in rows)
    assert "is as good as the second" in verdict(rows)
    again = losses_by_noise([teacher], "digits", images=30, batch=30)  # the batch is a matter of memory
    assert [row.losses[0] for row in again] == pytest.approx([row.losses[0] for row in rows], rel=1e-5)


def expected(x0: torch.Tensor) -> list[float]:
    """The loss of a network of F = 0 by noise level: the mean of |v / sigma_data|^2."""
    times = [math.atan(sigma / 0.5) for sigma in SIGMAS]
    return [math.cos(t) ** 2 + math.sin(t) ** 2 * float(x0.square().mean()) / 0.25 for t in times]


def muted(teacher, to, gain: float = 0.0, **changes):
    flow, config = load_checkpoint(teacher)
    torch.nn.init.constant_(flow.network.out_gain, gain)
    save_checkpoint(to, flow, replace(config, **changes))
    return to


def test_without_a_network_the_loss_is_the_targets_own_size(teacher, tmp_path):
    rows = losses_by_noise([muted(teacher, tmp_path / "mute")], "digits", images=1500)
    sizes = expected(open_dataset("digits").tensors(range(1500))[0])
    assert [row.losses[0] for row in rows] == pytest.approx(sizes, rel=0.01)


def test_latents_are_drawn_and_scaled(tmp_path):
    """Of mean 3 and deviation 4, where the teacher's scale is half and its bias 1: x0 of mean 2.5 and deviation 2."""
    torch.manual_seed(0)
    flow = FlowNetwork(UNet(8, 1, 0, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]), EDM())
    encoder = {"kind": "StabilityVAEEncoder", "scale": [0.5], "bias": [1.0]}
    config = CheckpointConfig(
        stage="teacher", provenance=Provenance(source="a test"), encoder=encoder, **describe(flow)
    )
    save_checkpoint(tmp_path / "latent", flow, config)
    (tmp_path / "set").mkdir()
    moments = np.stack([np.full((8, 8), 3), np.full((8, 8), 4)]).astype(np.float32)
    for i in range(100):
        np.save(tmp_path / "set" / f"{i}.npy", moments)
    rows = losses_by_noise([muted(tmp_path / "latent", tmp_path / "mute")], tmp_path / "set")
    x0 = torch.tensor([2.5 + 2, 2.5 - 2])
    assert [row.losses[0] for row in rows] == pytest.approx(expected(x0), rel=0.05)


def test_images_are_judged_by_their_classes(tmp_path):
    """A conditional teacher is worse on digits that are called by the next class."""
    digits = EMBEDDED["digits"]
    images, classes, _ = digits.load()
    (tmp_path / "set").mkdir()
    labels = [[f"{i:02}.png", (int(classes[i]) + 1) % 10] for i in range(40)]
    for i in range(40):
        Image.fromarray(images[i, 0]).save(tmp_path / "set" / f"{i:02}.png")
    for name, shift in (("own", -1), ("next", 0)):
        given = [[file, (label + shift) % 10] for file, label in labels]
        (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": given}))
        rows = losses_by_noise([digits.teacher], tmp_path / "set")
        if name == "own":
            own = rows
    assert rows[4].losses[0] > 1.2 * own[4].losses[0]


def test_the_worst_noise_level_is_named():
    rows = [Row(0.2, (1.0, 1.0)), Row(0.6, (1.5, 1.2)), Row(2.0, (1.0, 2.0))]
    assert "at sigma 0.6 its loss is 25.0% above" in verdict(rows)
    assert "at sigma 2 its loss is 2.1% above" in verdict([Row(0.2, (0.5, 1.0)), Row(2.0, (1.021, 1.0))])
    assert "is as good as the second" in verdict([Row(0.2, (0.5, 1.0)), Row(2.0, (1.019, 1.0))])


def test_a_table_has_the_ratio_of_the_first_to_the_second():
    lines = table([Row(0.2, (3.0, 2.0)), Row(20.0, (1.0, 4.0))]).splitlines()
    assert [line.split() for line in lines] == [
        ["sigma", "teacher", "original", "ratio"],
        ["0.2", "3.0000", "2.0000", "1.5000"],
        ["20", "1.0000", "4.0000", "0.2500"],
    ]
    assert table([Row(0.2, (3.0,))]).split() == ["sigma", "teacher", "0.2", "3.0000"]


def test_what_cannot_be_compared(teacher, tmp_path):
    with pytest.raises(DatasetError):
        losses_by_noise([teacher], tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="does not exist"):
        losses_by_noise([tmp_path / "no.pkl"], "digits")
    with pytest.raises(DatasetError, match="digits has 297 images, fewer than the 298 asked for"):
        losses_by_noise([teacher], "digits", split="test", images=298)
    with pytest.raises(DatasetError, match=r"the data tiles are images of 16x16 .* the network takes images of 8x8"):
        losses_by_noise([teacher], "tiles", images=2)
    loud = muted(teacher, tmp_path / "loud", gain=3e38)
    with pytest.raises(NotFiniteError, match=r"the loss of .*loud is not finite at sigma 0\.02, 0\.06, .* 20: "):
        losses_by_noise([teacher, loud], "digits", images=2)
