"""The loss of teachers by noise level."""

import pytest
import torch

from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.data.datasets import open_dataset
from edmdistill.errors import CheckpointError, DatasetError
from edmdistill.evaluation.noise_levels import SIGMAS, Row, losses_by_noise, table, verdict


def test_a_teacher_is_as_good_as_itself(teacher):
    rows = losses_by_noise([teacher, teacher], "digits", images=30, batch=7)
    assert [row.sigma for row in rows] == list(SIGMAS)
    assert all(row.losses[0] == row.losses[1] > 0 for row in rows)
    assert "is as good as the second" in verdict(rows)


def test_without_a_network_the_loss_is_the_targets_own_size(teacher, tmp_path):
    """F = 0: the mean of |v / sigma_data|^2, which is cos^2 + sin^2 E[x0^2] / sigma_data^2."""
    flow, config = load_checkpoint(teacher)
    torch.nn.init.zeros_(flow.network.out_gain)
    save_checkpoint(tmp_path / "mute", flow, config)
    (*_, row) = losses_by_noise([tmp_path / "mute"], "digits", images=1500)
    size = row.losses[0] * 0.25  # at sigma 20 it is E[x0^2], nearly
    assert size == pytest.approx(float(open_dataset("digits").tensors(range(1500))[0].square().mean()), rel=0.01)


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
