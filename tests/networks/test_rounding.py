"""Half precision and TF32 where a network predicts the noise."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from tiny_generator import tiny_generator

from edmdistill.checkpoints.load import load_denoiser, load_generator
from edmdistill.cli import main
from edmdistill.cli.options import use_precision
from edmdistill.kernels.linear import tf32_allowed
from edmdistill.machine.engine import Machine
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM, VP, Preconditioning
from edmdistill.networks.rounding import rounding_error
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.training.checks import rounding_note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [80.0, 2.5])
def test_the_error_is_what_is_measured(golden: Path, dtype: torch.dtype, sigma: float) -> None:
    """Within a factor of 2, as networks differ."""
    exact, rounded = (load_denoiser(golden / "vp-ddpmpp-uncond.pkl.gz", dtype=each) for each in (None, dtype))
    flow, name = exact.flow, str(dtype).removeprefix("torch.")
    x = sigma * torch.randn(2, flow.img_channels, flow.img_resolution, flow.img_resolution)
    error = (exact(x, sigma) - rounded(x, sigma)).square().mean().sqrt() / flow.sigma_data
    assert 0.5 < rounding_error(flow, name, sigma) / float(error) < 2
    assert rounding_error(flow, "float32", sigma) == 0
    finer = FlowNetwork(flow.network, VP(sigma_data=flow.sigma_data / 8))
    assert rounding_error(finer, name, sigma) == pytest.approx(8 * rounding_error(flow, name, sigma))


@pytest.mark.parametrize(
    ("preconditioning", "words", "warned"),
    [
        (VP(), "--dtype bfloat16", "is an error of about 1 sigma_data in images from noise level 80: use --dtype"),
        (VP(), "--dtype float16", "in float16 is an error of about 0.2 sigma_data"),
        (VP(), "--dtype bfloat16 --t 1.2", ""),
        (VP(), "--dtype float32", ""),
        (EDM(), "--dtype bfloat16", ""),
    ],
    ids=["bfloat16", "float16", "from a low level", "float32", "EDM"],
)
def test_commands_warn_where_it_shows(
    tmp_path: Path, preconditioning: Preconditioning, words: str, warned: str
) -> None:
    source = str(tiny_generator(tmp_path / "generator", preconditioning=preconditioning))
    options = [*words.split(), "--device", "cpu", *([] if "--t" in words else ["--nfe", "1"])]
    sample = ["sample", source, "--seeds", "0-1", "--out", str(tmp_path / "a.npz")]
    for command in (sample, ["eval", source, "--protocol", "digits", "--n", "4"]):
        result = CliRunner().invoke(main, [*command, *options])
        assert result.exit_code == 0, result.output
        assert warned in result.stderr
        assert ("Warning: the network predicts the noise" in result.stderr) == bool(warned)


@pytest.mark.parametrize(
    ("dtype", "preconditioning", "allowed"),
    [
        (None, EDM(), True),
        (None, VP(), False),
        ("float32", EDM(), False),
        ("float64", EDM(), False),
        ("tf32", VP(), True),
        ("float16", EDM(), True),
    ],
)
def test_tf32_is_as_it_is_asked_for_on_cuda(dtype: str | None, preconditioning: Preconditioning, allowed: bool) -> None:
    """torch's default, but not where its rounding would be seen."""
    flow = SimpleNamespace(device=torch.device("cuda"), preconditioning=preconditioning)
    for before in (False, True):
        with tf32_allowed(before):
            use_precision(dtype, SimpleNamespace(flow=flow))
            assert torch.backends.cudnn.allow_tf32 == allowed


def test_nothing_beside_a_network_that_predicts_the_noise_computes_in_tf32() -> None:
    model, guide = (
        SimpleNamespace(flow=SimpleNamespace(device=torch.device("cuda"), preconditioning=each))
        for each in (EDM(), VP())
    )
    for dtype, companions, allowed in ((None, [], True), (None, [guide], False), ("tf32", [guide], True)):
        with tf32_allowed(not allowed), pytest.MonkeyPatch.context() as patch:
            patch.setattr("edmdistill.sampling.build.rounding_warning", lambda model, spec: None)
            use_precision(dtype, model, SimpleNamespace(companions=companions))
            assert torch.backends.cudnn.allow_tf32 == allowed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_training_warns_of_tf32_where_it_exists(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edmdistill.training.checks.process_device", torch.device)
    flow = SimpleNamespace(preconditioning=VP(), sigma_data=0.5, sigma_max=80.0)
    for precision, warned in (("fp32", False), ("tf32", device == "cuda"), ("bf16", True)):
        recipe = SimpleNamespace(training=SimpleNamespace(precision=precision))
        note = rounding_note(recipe, flow, Machine(device))
        assert bool(note and f"whose rounding in {precision} is an error" in note) == warned


def test_a_record_names_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_generator(tiny_generator(tmp_path / "generator"))
    monkeypatch.setattr(FlowNetwork, "device", torch.device("cuda"))
    for allowed, name in ((True, "tf32"), (False, "float32")):
        with tf32_allowed(allowed):
            assert build_sampler(model, SamplerSpec()).record.dtype == name
            model.flow.compute_dtype = torch.bfloat16
            assert build_sampler(model, SamplerSpec()).record.dtype == "bfloat16"
            model.flow.compute_dtype = None
    with tf32_allowed(True):
        torch.backends.cuda.matmul.allow_tf32 = False  # torch's default: in convolutions alone
        assert build_sampler(model, SamplerSpec()).record.dtype == "tf32"
