"""Single jumps and score gaps, where they are known."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_generator import tiny_generator

from edmdistill import assets
from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.store import load_checkpoint, save_checkpoint
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.errors import CheckpointError, DatasetError, EdmDistillError, NotFiniteError
from edmdistill.evaluation import diagnosis
from edmdistill.evaluation.collect import collect_statistics, write_statistics
from edmdistill.evaluation.diagnosis import (
    Diagnosis,
    Gap,
    SingleJump,
    _images,
    diagnose,
    diagnose_networks,
    jump_distances,
    read_measures,
    score_gaps,
    sentences,
)
from edmdistill.evaluation.frechet import statistics
from edmdistill.features.spaces import Pixels
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.sampling.decode import open_decoder

ASSETS = Path(assets.__file__).parent


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


class Coarse(Pixels):
    """A mean of each quarter of a picture: few enough numbers for a distance of large pictures."""

    def features_and_logits(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images / 127.5 - 1, 2).flatten(1), None


@pytest.fixture
def latents(tmp_path, golden, vae):
    """Twelve latents, and the pictures that they are decoded to."""
    decode = open_decoder(ENCODER, vae)
    moments = torch.randn(12, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    moments[:, 4:] = 1e-6
    pictures = decode(moments[:, :4] * 0.25 + 0.1)
    for name in ("latents", "pictures"):
        (tmp_path / name).mkdir()
    for i, (moment, picture) in enumerate(zip(moments.numpy(), pictures.numpy(), strict=True)):
        np.save(tmp_path / "latents" / f"{i:02d}.npy", moment)
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / "pictures" / f"{i:02d}.png")
    return tmp_path / "latents"


ENCODER = {"kind": "StabilityVAEEncoder", "scale": [0.25] * 4, "bias": [0.1] * 4, "raw_mean": [0.0] * 4}


@pytest.fixture
def vae(golden):
    return str(golden / "evaluation/latents/tiny-vae")


def test_latents_are_drawn_scaled_and_decoded(latents, vae):
    """A jump that keeps them gives the pictures that they were decoded to."""
    data, pictures = open_dataset(latents), open_dataset(latents.parent / "pictures")
    decode, real = open_decoder(ENCODER, vae), statistics(Coarse()(pictures.images(range(12))))
    kept, fainter = (
        jump_distances(Recalling(blur), data, Coarse(), [1e-4], real=real, decode=decode, count=12, batch=5)[0]
        for blur in (0.0, 0.5)
    )
    assert kept < 1e-4 * fainter


def test_a_generator_of_latents_is_diagnosed_against_statistics(latents, vae, tmp_path, monkeypatch):
    """Of pictures, which stand for them as well as the pictures themselves."""
    monkeypatch.setattr(diagnosis, "load_features", lambda name, weights, device: Coarse())
    generator = tiny_generator(tmp_path / "generator", channels=4, label_dim=0, encoder=ENCODER)
    given = {"protocol": "pixels", "data": latents, "vae": vae, "count": 6, "batch": 4}
    found = diagnose(generator, reference=tmp_path / "pictures", **given)
    assert all(math.isfinite(jump.generator) for jump in found.jumps)
    pictures = open_dataset(tmp_path / "pictures")
    about, spaces = collect_statistics(pictures, {"pixels": Coarse()})
    write_statistics(tmp_path / "pictures.npz", about, spaces)
    again = diagnose(generator, reference=tmp_path / "pictures.npz", **given)
    for one, other in zip(found.jumps, again.jumps, strict=True):
        assert one.generator == pytest.approx(other.generator, rel=1e-6)


class Formula:
    """A network in closed form, F(x, t, second), that refuses to be given the class of another image.

    Attributes:
        rows: images that it has been called with.
    """

    sigma_data, sigma_max, device = 0.5, 80.0, torch.device("cpu")

    def __init__(self, F: Callable[..., torch.Tensor], two_time: bool = False, shades: int = 0) -> None:
        self.F, self.two_time, self.shades, self.rows = F, two_time, shades, 0

    def __call__(self, x, t, labels, second=None):
        self.rows += len(x)
        if self.shades:
            assert torch.equal(labels.argmax(1), (x.mean((1, 2, 3)) + 1).mul(self.shades / 2).round().long())
        return self.F(x, t, second)

    def jump(self, x, t, s, labels):
        return self(x, t, labels, s)


def test_gaps_of_scores_that_are_known():
    data = open_dataset("digits", split="test")
    zero = Formula(lambda x, s, t: torch.zeros_like(x))
    steep = Formula(lambda x, s, t: torch.full_like(x, 3 + float(s) - 2 * float(t)), two_time=True)
    (gap,) = score_gaps(zero, zero, steep, data, sigmas_s=[0.1], sigmas_t=[0.6, 0.1], count=20, batch=7)
    s, t, last = (math.atan(sigma / 0.5) for sigma in (0.1, 0.6, 80.0))
    assert gap == pytest.approx((0.1, 0.6, 0.5 * (3 + s - 2 * t), 2 * (last - t) / (3 + s - 2 * t)))
    # F_psi = x_s of one time, where the generator's F = 0 gives x0 = cos(t) x_t: two independent noises.
    copying = Formula(lambda x, s, t: x)
    (gap,) = score_gaps(zero, zero, copying, data, sigmas_s=[1.0], sigmas_t=[2.5], count=1000)
    cos_s, cos_t = (math.cos(math.atan(sigma / 0.5)) ** 2 for sigma in (1.0, 2.5))
    x0 = float(data.tensors(range(len(data)))[0].square().mean())
    x_s = cos_s * cos_t * (cos_t * x0 + (1 - cos_t) * 0.25) + (1 - cos_s) * 0.25
    assert gap.gap == pytest.approx(0.5 * x_s**0.5, rel=0.02)
    assert gap.sensitivity == 0


def test_every_network_is_given_the_images_classes():
    classes = [i % 10 for i in range(40)]
    data = Dataset("shades", "train", [f"{i}.png" for i in range(40)],
                   lambda i: np.full((1, 4, 4), 25 * classes[i], np.uint8), labels=np.array(classes))  # fmt: skip
    one, other, third = (Formula(lambda x, s, t: torch.zeros_like(x), shades=10) for _ in range(3))
    score_gaps(one, other, third, data, sigmas_s=[1e-4], sigmas_t=[1e-3], count=40, batch=15)
    jump_distances(one, data, Pixels(), [1e-4], count=40, batch=15)
    assert (one.rows, other.rows, third.rows) == (80, 80, 80)


def test_the_batch_is_a_matter_of_memory():
    data = open_dataset("digits", split="test")
    faint = Formula(lambda x, t, s: x / 2)
    measured = [
        jump_distances(faint, data, Pixels(), [1.0], count=50, batch=batch)
        + [gap.gap for gap in score_gaps(faint, faint, Formula(lambda x, s, t: x), data, count=50, batch=batch)]
        for batch in (7, 50)
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)


def test_what_is_not_finite_has_no_distance_and_no_gap(tmp_path):
    data = open_dataset("digits", split="test")
    zero = Formula(lambda x, s, t: torch.zeros_like(x))
    broken = Formula(lambda x, t, s: torch.where(x.amax((1, 2, 3), keepdim=True) > 1.5, math.nan, x))
    with pytest.raises(NotFiniteError, match=r"^\d of 50 images of a jump from sigma 80 are not finite: check the w"):
        jump_distances(broken, data, Pixels(), [1e-4, 80.0], count=50, batch=20)
    with pytest.raises(NotFiniteError, match=r"^the score gap at sigma 0\.1 of jumps from sigma 5 is not finite"):
        score_gaps(zero, zero, Formula(lambda x, s, t: x * math.inf), data, sigmas_s=[0.1], sigmas_t=[5], count=20)
    with pytest.raises(NotFiniteError, match=r"^20 of 20 images"):
        diagnose(tiny_generator(tmp_path / "loud", scale=3e38), protocol="digits", count=20)


def test_what_is_known_of_the_teacher_is_not_measured_again():
    data = open_dataset("digits", split="test")
    networks = [Formula(lambda x, t, s: x) for _ in range(3)]
    batches = []
    found = diagnose_networks(
        *networks, data, Pixels(), teacher_jumps=list(range(8)), count=25, batch=20, on_batch=lambda: batches.append(1)
    )
    assert [jump.teacher for jump in found.jumps] == list(range(8))
    pairs = len(found.gaps)
    # Of 25 jumps from 8 levels, 2 for the gaps; the auxiliary score reads x_s twice, of t and of the last time.
    assert [network.rows for network in networks] == [8 * 25 + 2 * pairs, 4 * pairs, 4 * pairs]
    assert len(batches) == 15 + 2 + 1  # the data's, the jumps', the gaps'
    few = diagnose_networks(*networks, data, Pixels(), teacher_jumps=[1.0] * 8, count=5)
    assert all(math.isfinite(gap.gap) for gap in few.gaps)


def test_a_line_of_metrics_holds_a_diagnosis():
    whole = Diagnosis([SingleJump(80, 9.0, 8.0), SingleJump(0.3, 2.0)], [Gap(0.1, 0.3, 0.5, 0.25)])
    assert read_measures({"images": 5, "gap_error": 2.0} | whole.measures()) == whole
    assert set(whole.measures()) == {
        *("jump/generator/80", "jump/teacher/80", "jump/generator/0.3", "gap/0.1/0.3", "gap_sensitivity/0.1/0.3")
    }
    assert read_measures({"images": 5}) == Diagnosis([], [])


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


def test_a_state_without_an_auxiliary_score_has_no_gaps(whole, teacher, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole("cosim")[1], run)
    for state in (run / "state").iterdir():
        progress = json.loads((state / "progress.json").read_text())
        del progress["sha256"]["auxiliary"]
        (state / "progress.json").write_text(json.dumps(progress))
        (state / "auxiliary.safetensors").unlink()
    assert diagnose(run, protocol="digits", teacher=teacher, count=10).gaps == []


def test_a_teacher_is_no_generator(teacher):
    with pytest.raises(CheckpointError, match="is a teacher, not a generator"):
        diagnose(teacher, protocol="digits")


def test_nothing_is_dropped_out(tmp_path):
    small = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": ()}
    network = UNet(8, 1, 10, logvar_channels=4, dropout=0.9, **small)
    torch.nn.init.ones_(network.out_gain)
    flow = FlowNetwork(network, EDM())
    config = CheckpointConfig(stage="generator", provenance=Provenance(source="a test"), **describe(flow))
    save_checkpoint(tmp_path / "generator", flow, config)
    once, again = (diagnose(tmp_path / "generator", protocol="digits", count=10) for _ in range(2))
    assert once == again


def test_weights_are_those_of_the_protocols_features(tmp_path):
    generator = tiny_generator(tmp_path / "generator")
    tensors = load_file(ASSETS / "digits-features.safetensors")
    own = tmp_path / "own.safetensors"  # features twice as large
    save_file({name: (2 if name.startswith("hidden") else 1) * tensor for name, tensor in tensors.items()}, own)
    plain, doubled = (diagnose(generator, protocol="digits", count=10, weights=w).jumps for w in ({}, {"digits": own}))
    for one, other in zip(plain, doubled, strict=True):
        assert other.generator == pytest.approx(4 * one.generator, rel=1e-3)
    with pytest.raises(EdmDistillError, match="weights of dinov2 were given, but edm2 compares images in inception: "):
        diagnose(generator, protocol="edm2", reference="digits", weights={"dinov2": own})


def test_what_jumps_cannot_start_from(tmp_path):
    generator = tiny_generator(tmp_path / "generator")
    with pytest.raises(DatasetError, match=r"the data tiles are images of 16x16 .* the network takes images of 8x8"):
        diagnose(generator, protocol="tiles")
    np.savez(tmp_path / "moments.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(
        DatasetError, match=r"moments\.npz holds statistics, and jumps start from a data set of images: .* --data$"
    ):
        diagnose(generator, protocol="edm", reference=tmp_path / "moments.npz")
    encoder = {"kind": "StabilityVAEEncoder", "scale": [0.5], "bias": [1.0]}
    latent = tiny_generator(tmp_path / "latent", encoder=encoder)
    with pytest.raises(
        DatasetError, match=r"reference of digits holds images, and jumps start from a data set of latents: .* --data$"
    ):
        diagnose(latent, protocol="digits")


@pytest.mark.parametrize("layout", [("images", "labels"), ("arr_0", "arr_1"), ("images",), ("arr_0",)])
def test_real_images_may_be_an_npz(tmp_path, layout):
    """With classes or without; of a size that the network makes."""
    generator = tiny_generator(tmp_path / "generator")
    images = open_dataset("digits").images(range(12)).permute(0, 2, 3, 1).numpy()
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[:, :, 0]).save(tmp_path / "folder" / f"{i:02}.png")
    arrays = dict(zip(layout, (images, np.arange(12) % 10), strict=False))
    np.savez(tmp_path / "few.npz", **arrays)
    options = {"protocol": "pixels", "data": "digits", "count": 10}
    first, second = (diagnose(generator, reference=tmp_path / name, **options) for name in ("folder", "few.npz"))
    assert first == second
    with pytest.raises(DatasetError, match=r"few\.npz is an .npz of images, and jumps start from a data set of images"):
        diagnose(generator, protocol="pixels", reference=tmp_path / "few.npz")
    np.savez(tmp_path / "large.npz", **arrays | {layout[0]: images.repeat(2, 1).repeat(2, 2)})
    with pytest.raises(
        DatasetError, match=r"the images are 1x8x8, but those of the reference .*large\.npz are 1x16x16"
    ):
        diagnose(generator, reference=tmp_path / "large.npz", **options)


def test_the_sentences_name_the_levels():
    jumps = [SingleJump(80, 9.0, 500.0), SingleJump(5, 3.0, 100.0), SingleJump(0.6, 12.0, 7.0)]
    gaps = [Gap(0.1, 80, 0.3, 0.0), Gap(0.1, 5, 0.2, 0.9), Gap(0.1, 0.6, 0.2, 0.02)]
    text = " ".join(sentences(Diagnosis(jumps, gaps)))
    assert "best from sigma 5" in text
    assert "worst from sigma 0.6" in text
    assert "At sigma 0.6 a shorter jump is worse" in text
    assert "At sigma 0.6 a jump is worse than the teacher's denoiser" in text
    assert "hardly tells jumps from sigma 0.6 from the longest ones: at sigma 0.1 its gap differs by 2%" in text
    assert "differ most at sigma 0.1 of jumps from 80, by 0.3." in text
    healthy = sentences(Diagnosis([SingleJump(80, 9.0), SingleJump(5, 3.0)], []))
    assert len(healthy) == 1
    fine = Diagnosis(
        [SingleJump(80, 9.0, 8.0), SingleJump(5, 3.0, 2.5)], [Gap(0.1, 80, 0.2, 0.0), Gap(0.1, 5, 0.3, 0.2)]
    )
    assert [sentence.split(",")[0] for sentence in sentences(fine)] == [
        "A jump is best from sigma 5",
        "The scores differ most at sigma 0.1 of jumps from 5",
    ]
