"""Published generators compute what their authors' code computes, from the noise level that it starts at."""

import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tolerance import assert_rounded, depth

from edmdistill.atomic import sha256_file
from edmdistill.checkpoints.config import Provenance
from edmdistill.checkpoints.convert import convert
from edmdistill.checkpoints.encoder import PIXELS
from edmdistill.checkpoints.layout import MODEL
from edmdistill.checkpoints.load import load_generator
from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official, load_official
from edmdistill.checkpoints.published_generators import GENERATORS, convert_generator
from edmdistill.checkpoints.store import load_tensors
from edmdistill.cli import main
from edmdistill.cli.convert import command
from edmdistill.errors import CheckpointError
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import ConsistencyBoundary
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.trigflow import denoised, sigma_to_time


def one_step(folder: Path, noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """What `sample --nfe 1` draws."""
    with torch.no_grad():
        return build_sampler(load_generator(folder), SamplerSpec(nfe=1)).draw(
            noise, labels, randn_like=torch.randn_like
        )


def noise_for(flow: FlowNetwork) -> torch.Tensor:
    return torch.randn(2, flow.img_channels, flow.img_resolution, flow.img_resolution)


@torch.no_grad()
def test_sid_is_the_denoiser_at_2_5(golden: Path, tmp_path: Path) -> None:
    file = tmp_path / "network-snapshot-1.200000-403968.pkl"  # as SiD names them, which no teacher's command takes
    file.write_bytes((golden / "edm-tiny-cond.pkl").read_bytes())
    with pytest.raises(CheckpointError, match="one-step generator of SiD"):
        convert(file, tmp_path / "teacher")
    report = convert_generator(file, tmp_path / "sid", "sid")
    assert (report.config.stage, report.config.method, report.config.sigma_max) == ("generator", "sid", 2.5)
    flow, _ = build_official(read_official(golden / "edm-tiny-cond.pkl"))
    noise, labels = noise_for(flow), torch.tensor([0, 1])
    expected = Denoiser(flow).eval()(2.5 * noise, torch.tensor(2.5), labels)
    assert_rounded(one_step(tmp_path / "sid", noise, labels), expected, 100)


def test_sida_without_an_encoder_has_edm2_s(golden: Path, tmp_path: Path) -> None:
    """Where there is one, it is kept; images of three channels have none."""
    data, key = (golden / "edm2-latent-cond.pkl").read_bytes(), b"\x8c\x07encoder"
    assert data.count(key) == 1
    (tmp_path / "sida.pkl").write_bytes(data.replace(key, key[:-1] + b"x"))
    _, config = load_official(golden / "edm2-latent-cond.pkl")
    assert load_official(tmp_path / "sida.pkl")[1].encoder == PIXELS
    convert_generator(tmp_path / "sida.pkl", tmp_path / "without", "sid")
    encoder = load_generator(tmp_path / "without").config.encoder
    assert (encoder["kind"], encoder["vae_name"]) == (config.encoder["kind"], config.encoder["vae_name"])
    for name in ("scale", "bias"):
        assert encoder[name] == pytest.approx(config.encoder[name], rel=1e-5)
    assert convert_generator(golden / "edm2-latent-cond.pkl", tmp_path / "with", "sid").config.encoder == config.encoder
    assert convert_generator(golden / "edm-tiny-cond.pkl", tmp_path / "rgb", "sid").config.encoder == PIXELS


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("edm-tiny-cond.pkl", {"EDMPrecond": "EDMPrecond_EncoderDecoder", "SongUNet": "SongUNet_EncoderDecoder"}),
        ("edm2-rgb-cond.pkl", {"Precond": "EDM_2_Precond_EncoderDecoder", "UNet": "UNet_EncoderDecoder"}),
    ],
)
def test_sidas_classes_compute_the_same(golden: Path, tmp_path: Path, name: str, classes: dict[str, str]) -> None:
    data = (golden / name).read_bytes()
    for theirs, sidas in classes.items():
        old, new = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (theirs, sidas))
        assert old in data
        data = data.replace(old, new)
    (tmp_path / "sida.pkl").write_bytes(data)
    convert_generator(golden / name, tmp_path / "sid", "sid")
    convert_generator(tmp_path / "sida.pkl", tmp_path / "sida", "sid")
    flow, labels = load_generator(tmp_path / "sid").flow, torch.tensor([0, 1])
    noise = noise_for(flow)
    expected = one_step(tmp_path / "sid", noise, labels)
    assert_rounded(one_step(tmp_path / "sida", noise, labels), expected, depth(flow))  # other places in a file


@torch.no_grad()
def test_dmd2_is_the_denoiser_at_80(golden: Path, tmp_path: Path) -> None:
    official = read_official(golden / "edm-adm-multihead.pkl.gz")
    torch.save(dict(official.tensors), tmp_path / "pytorch_model.bin")
    flow, config = build_official(official)
    origin = convert_generator(tmp_path / "pytorch_model.bin", tmp_path / "dmd2", "dmd2").config.provenance
    digest = sha256_file(tmp_path / "pytorch_model.bin")
    assert origin == Provenance(source="pytorch_model.bin", sha256=digest, licence="cc-by-nc-sa-4.0")
    found = load_generator(tmp_path / "dmd2").config.network.arguments
    assert {name: config.network.arguments[name] for name in found if name != "dropout"} == {
        name: value for name, value in found.items() if name != "dropout"
    }
    noise = noise_for(flow)
    labels = torch.tensor([0, 1]) if flow.label_dim else None
    assert_rounded(
        one_step(tmp_path / "dmd2", noise, labels), Denoiser(flow).eval()(80 * noise, torch.tensor(80.0), labels), 500
    )


def test_the_boundary_is_the_identity_and_both_views_agree() -> None:
    boundary = ConsistencyBoundary(sigma_min=0.002, c_noise_scale=250.0)
    sigma = torch.tensor([0.002, 0.01, 0.5, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = boundary.coefficients(sigma)
    assert (float(c_skip[0]), float(c_out[0])) == (1.0, 0.0)
    torch.testing.assert_close(c_noise, 250 * sigma.log())
    t, x, raw = sigma_to_time(sigma, 0.5), torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    a, b, c, same = boundary.trigflow(t)
    x_t = t.cos() * x
    torch.testing.assert_close(c * x_t, c_in * x)
    torch.testing.assert_close(same, c_noise)
    F = (a * x_t + b * raw).reshape(4, 1, 1, 1)
    D = denoised(x_t.reshape(4, 1, 1, 1), F, t, 0.5).flatten()
    torch.testing.assert_close(D, c_skip * x + c_out * raw, rtol=1e-9, atol=1e-9)


def test_ect_of_edm2_has_another_middle(golden: Path, tmp_path: Path) -> None:
    convert_generator(golden / "edm2-rgb-cond.pkl", tmp_path / "ect", "ect")
    assert load_generator(tmp_path / "ect").config.sampling.sigmas["2"] == (80.0, 1.526)


@torch.no_grad()
def test_ect_starts_at_80_and_returns_to_its_middle(golden: Path, tmp_path: Path) -> None:
    file = tmp_path / "ecm.pkl"
    edm = (golden / "edm-tiny-cond.pkl").read_bytes().replace(b"EDMPrecond", b"ECMPrecond")
    file.write_bytes(edm.replace(b"sigma_min\x94K\0", b"sigma_min\x94G" + struct.pack(">d", 0.003)))
    with pytest.raises(CheckpointError, match="--generator ect"):
        convert(file, tmp_path / "teacher")
    convert_generator(file, tmp_path / "ect", "ect")
    generator = load_generator(tmp_path / "ect")
    assert generator.config.preconditioning["kind"] == "consistency"
    assert build_sampler(generator, SamplerSpec(nfe=2)).record.sigmas == pytest.approx((80.0, 0.821))
    noise, labels = noise_for(generator.flow), torch.tensor([0, 1])
    raw, _ = build_official(read_official(golden / "edm-tiny-cond.pkl"))
    below = 0.003  # the default of its class, where that of EDM and OpenAI is 0.002
    x = 80 * noise
    F = (Denoiser(raw).eval()(x, torch.tensor(80.0), labels) - x * 0.25 / (6400 + 0.25)) / (40 / (6400 + 0.25) ** 0.5)
    assert generator.flow.sigma_min == below
    expected = x * 0.25 / ((80 - below) ** 2 + 0.25) + (80 - below) * 0.5 / (6400 + 0.25) ** 0.5 * F
    assert_rounded(one_step(tmp_path / "ect", noise, labels), expected, 500)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"enc.8x8_block0.conv0.weight": torch.zeros(4, 4, 3, 3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds other weights, without [^ ]*: give the pytorch_model\.bin"):
        convert_generator(tmp_path / "pytorch_model.bin", tmp_path / "out", "dmd2")
    assert not (tmp_path / "out").exists()


def test_a_generator_is_written_over_nothing_unless_that_is_said(golden: Path, tmp_path: Path) -> None:
    source = golden / "edm-tiny-cond.pkl"
    convert_generator(source, tmp_path / "out", "sid")
    with pytest.raises(CheckpointError, match="holds a checkpoint already, a generator"):
        convert_generator(source, tmp_path / "out", "ect")
    assert convert_generator(source, tmp_path / "out", "ect", overwrite=True).config.method == "ect"
    with pytest.raises(CheckpointError, match=r"is a folder: give the file, SiD's and SiDA's one-step pickles"):
        convert_generator(tmp_path / "out", tmp_path / "again", "sid")


@torch.no_grad()
def test_half_precision_is_read_as_float32(golden: Path, tmp_path: Path) -> None:
    official = read_official(golden / "edm-adm-multihead.pkl.gz")
    torch.save({name: tensor.half() for name, tensor in official.tensors.items()}, tmp_path / "pytorch_model.bin")
    convert_generator(tmp_path / "pytorch_model.bin", tmp_path / "dmd2", "dmd2")
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "dmd2" / MODEL)[0].values()} == {torch.float32}


def test_the_command_names_them(golden: Path, tmp_path: Path) -> None:
    choices = next(option.type for option in command.params if option.name == "generator")
    assert list(choices.choices) == list(GENERATORS)  # written out there, because --help does not import torch
    result = CliRunner().invoke(
        main, ["convert", str(golden / "edm-tiny-cond.pkl"), str(tmp_path / "g"), "--generator", "sid"]
    )
    assert result.exit_code == 0
    assert "a generator by sid that starts at sigma 2.5" in result.stdout
