"""Single jumps and score gaps, where they are known."""

import pytest
import torch
from msgspec.structs import replace
from tiny_generator import tiny_generator

from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.data.datasets import open_dataset
from edmdistill.errors import CheckpointError
from edmdistill.evaluation.diagnosis import (
    Diagnosis,
    Gap,
    SingleJump,
    _images,
    diagnose,
    jump_distances,
    score_gaps,
    sentences,
)
from edmdistill.features.spaces import Pixels
from edmdistill.networks.surgery.two_time import add_second_time


class Recalling(torch.nn.Module):
    """Returns the real images of its labels' places, whatever it is asked: no distance at all."""

    sigma_data, device = 0.5, torch.device("cpu")

    def __init__(self, blur: float = 0.0) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros([]))
        self.blur = blur

    def jump(self, x_t, t, s, labels):
        x0 = x_t / t.cos().float()  # at small sigma, nearly the image
        return x0 * (1 - self.blur)


def test_a_jump_that_keeps_the_image_has_no_distance_and_a_fainter_one_has():
    data = open_dataset("digits", split="test")
    distances = [
        jump_distances(Recalling(blur), data, Pixels(), [1e-4], count=297, batch=100)[0] for blur in (0.0, 0.1, 0.2)
    ]
    assert distances[0] == pytest.approx(0, abs=1e-3)
    # Images of mean m and covariance C are multiplied by 1 - b: b^2 (|m|^2 + tr C).
    size = float(data.tensors(range(len(data)))[0].square().sum((1, 2, 3)).mean())
    # Cutting to 8 bits darkens by half a step, which is more of the smaller one.
    assert distances[1:] == pytest.approx([0.01 * size, 0.04 * size], rel=0.06)


def test_images_that_are_sorted_by_class_are_drawn_from_all_classes(teacher):
    data = open_dataset("tiles", split="test")
    labels = torch.cat([one for _, one, _ in _images(load_checkpoint(teacher)[0], data, 90, 50)])
    assert len(labels) == 90
    assert all(5 <= count <= 30 for count in labels.sum(0).tolist())


def test_a_teacher_against_itself_has_no_gap_and_one_that_reads_t_is_sensitive_to_it(teacher):
    flow = load_checkpoint(teacher)[0]
    data = open_dataset("digits", split="test")
    auxiliary = add_second_time(flow)
    gaps = score_gaps(flow, flow, auxiliary, data, sigmas_s=[0.1], sigmas_t=[80.0, 0.6, 0.05], count=20)
    assert [(gap.sigma_s, gap.sigma_t) for gap in gaps] == [(0.1, 80.0), (0.1, 0.6)], "only s < t"
    assert all(gap.gap < 1e-5 for gap in gaps)
    with torch.no_grad():
        auxiliary.network.second_time.gain.fill_(1.0)
    far, near = score_gaps(flow, flow, auxiliary, data, sigmas_s=[0.1], sigmas_t=[80.0, 0.6], count=20)
    assert near.gap > 1e-3
    assert far.sensitivity == 0
    assert near.sensitivity > 0.1


def test_the_generator_that_is_its_teacher_is_no_worse_than_it(teacher, tmp_path):
    flow, config = load_checkpoint(teacher)
    save_checkpoint(tmp_path / "generator", flow, replace(config, stage="generator"))
    found = diagnose(tmp_path / "generator", protocol="digits", teacher=teacher, count=70)
    assert all(jump.generator == jump.teacher for jump in found.jumps)
    assert not found.gaps, "no run, no auxiliary score"
    assert not any("teacher's denoiser" in sentence for sentence in sentences(found))


@pytest.mark.parametrize("method", ["cosim", "vsd", pytest.param("dmd2", marks=pytest.mark.slow)])
def test_a_run_has_gaps_and_another_teacher_is_refused(method, whole, teacher, tmp_path):
    run, folder = whole(method)
    gaps = diagnose(folder, protocol="digits", teacher=teacher, count=70).gaps
    assert all(0 < gap.gap < 10 for gap in gaps)
    assert (max(gap.sensitivity for gap in gaps) > 0) == (method == "cosim"), "only CoSIM's auxiliary score reads t"
    other = tiny_generator(tmp_path / "other", stage="teacher")
    assert load_checkpoint(other)[0].network.state_dict().keys() != run.networks["teacher"].network.state_dict().keys()
    with pytest.raises(CheckpointError, match="distilled from another teacher"):
        diagnose(folder, protocol="digits", teacher=other)


def test_a_teacher_is_no_generator(teacher):
    with pytest.raises(CheckpointError, match="is a teacher, not a generator"):
        diagnose(teacher, protocol="digits")


def test_the_sentences_name_the_levels():
    jumps = [SingleJump(80, 9.0, 500.0), SingleJump(5, 3.0, 100.0), SingleJump(0.6, 12.0, 7.0)]
    gaps = [Gap(0.1, 80, 0.3, 0.0), Gap(0.1, 0.6, 0.2, 0.02)]
    text = " ".join(sentences(Diagnosis(jumps, gaps)))
    assert "best from sigma 5" in text
    assert "worst from sigma 0.6" in text
    assert "At sigma 0.6 a shorter jump is worse" in text
    assert "At sigma 0.6 a jump is worse than the teacher's denoiser" in text
    assert "hardly tells jumps from sigma 0.6" in text
    healthy = sentences(Diagnosis([SingleJump(80, 9.0), SingleJump(5, 3.0)], []))
    assert len(healthy) == 1
