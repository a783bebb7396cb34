"""CTM's networks compute what their authors' code computes."""

import gzip
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from openai_weights import Weights, weights_of
from safetensors.torch import load_file
from torch import Tensor

from edmdistill.checkpoints.class_names import dataset_class_names
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.load import load_generator
from edmdistill.checkpoints.openai import RESOLUTIONS, read_openai
from edmdistill.checkpoints.published_generators import convert_generator
from edmdistill.errors import CheckpointError
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.trigflow import sigma_to_time


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the layout of sony/ctm's."""
    monkeypatch.setitem(RESOLUTIONS, (1, 2), 8)
    torch.save(weights_of(two_time=True), tmp_path / "ema_0.999_049000.pt")
    return tmp_path / "ema_0.999_049000.pt"


@pytest.fixture
def cifar10(golden: Path, tmp_path: Path) -> Path:
    """A file that Kim-Dongjun/ctm-cifar10's code wrote."""
    path = tmp_path / "ema_0.999_034000.pt"
    path.write_bytes(gzip.decompress((golden / "ctm-cifar10.pt.gz").read_bytes()))
    return path


def weights_in(path: Path) -> Weights:
    weights: Weights = torch.load(path, weights_only=True)
    return weights


def convert(path: Path, out: Path) -> Generator:
    """The generator in it, after it was refused as a teacher."""
    with pytest.raises(CheckpointError, match="--generator ctm"):
        read_openai(path, "")
    config = convert_generator(path, out, "ctm").config
    assert (config.two_time, config.sampling.gamma) == (True, 0.0)
    return load_generator(out)


@torch.no_grad()
def assert_same_function(generator: Generator, expected: dict[str, Tensor], case: str, bound: dict[str, float]) -> None:
    """Jumps between single times, and their sampler `exact`, of which every step is a jump."""
    noise, labels = expected["noise"], expected["labels"] if generator.flow.label_dim else None

    def jump(x: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
        """The jump in EDM's scale, where x_t = cos(t) x."""
        t, s = sigma_to_time(sigma, 0.5), sigma_to_time(after, 0.5)
        x_s = generator.jump(t.cos().reshape(-1, 1, 1, 1) * x, t, s, labels)
        return (x_s / s.cos().reshape(-1, 1, 1, 1)).float()

    x = expected["t"].reshape(-1, 1, 1, 1) * noise
    torch.testing.assert_close(jump(x, expected["t"], expected["s"]), expected[f"{case}G"], **bound)
    for nfe in (1, 3):
        sampler = build_sampler(generator, SamplerSpec(nfe=nfe))
        levels = torch.tensor([*sampler.record.sigmas, 0.002])
        x = 80 * noise
        for pair in pairwise(levels):
            x = jump(x, *pair)
        torch.testing.assert_close(x, expected[f"{case}exact.{nfe}"], **bound)
        drawn = sampler.draw(noise, labels, randn_like=torch.zeros_like)
        left = 0.002 / float(levels[-2])  # the share of the last point that their last jump keeps
        torch.testing.assert_close(drawn, x, rtol=0, atol=1.1 * left * float(levels[-2] * noise.abs().max() + 1))


def test_imagenet_is_adm(imagenet: Path, golden: Path, tmp_path: Path) -> None:
    generator = convert(imagenet, tmp_path / "ctm")
    assert generator.config.provenance.licence == "mit"
    expected = load_file(golden / "ctm.safetensors")
    assert_same_function(generator, expected, "", {"rtol": 1e-4, "atol": 1e-4})


@pytest.mark.parametrize("case", ["", "uncond."])
def test_cifar10_is_ddpmpp(case: str, cifar10: Path, golden: Path, tmp_path: Path) -> None:
    if case:
        torch.save({name: w for name, w in weights_in(cifar10).items() if "map_label" not in name}, cifar10)
    generator = convert(cifar10, tmp_path / "ctm")
    assert generator.config.provenance.licence == "cc-by-nc-sa-4.0"
    assert generator.label_names == (None if case else dataset_class_names("cifar10"))
    expected = load_file(golden / "ctm-cifar10.safetensors")
    assert_same_function(generator, expected, case, {"rtol": 1e-5, "atol": 1e-5})


def test_weights_without_a_second_time_are_refused(tmp_path: Path) -> None:
    torch.save(weights_of(), tmp_path / "one.pt")
    with pytest.raises(CheckpointError, match=r"one\.pt reads no second time: give a CTM generator [^\n]*$"):
        convert_generator(tmp_path / "one.pt", tmp_path / "out", "ctm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "other", "why"),
    [
        ("model.map_layer0.weight", None, "holds other weights, without map_layer0.*: give a CTM generator"),
        (
            "model.enc.8x8_block0.affine.weight",
            None,
            "weights, without enc.8x8_block0.affine.*: give a CTM generator",
        ),
        ("model.enc.8x8_block0.affine_s.weight", torch.zeros(8, 3), "in shape"),
        ("model.dec.8x8_aux_conv_train.weight", torch.zeros(3, 8, 3, 3), "has no place"),  # "linear probing"
        ("model.map_noise.freqs", torch.zeros(2), "has no place"),  # NCSN++
        ("model.enc.8x8_block99999999.conv0.weight", torch.zeros(8, 8, 3, 3), "num_blocks"),
        ("model.map_layer0.bias", torch.full((16,), torch.nan), "NaN or infinity"),
    ],
)
def test_other_networks_are_refused_in_one_sentence(
    name: str, other: Tensor | None, why: str, cifar10: Path, tmp_path: Path
) -> None:
    weights = weights_in(cifar10)
    if other is None:
        del weights[name]
    else:
        weights[name] = other
    torch.save(weights, cifar10)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{why}[^\n]*$"):
        convert_generator(cifar10, tmp_path / "out", "ctm")
    assert not (tmp_path / "out").exists()


def test_damaged_imagenet_weights_are_refused(imagenet: Path, tmp_path: Path) -> None:
    weights = weights_in(imagenet)
    del weights["middle_block.0.emb_layers.1.weight"]
    torch.save(weights, imagenet)
    with pytest.raises(CheckpointError, match=r"^[^\n]*: give a CTM generator for ImageNet 64x64 or CIFAR-10[^\n]*$"):
        convert_generator(imagenet, tmp_path / "out", "ctm")
