"""Half precision where a network predicts the noise."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_generator import tiny_generator

from edmdistill.checkpoints.load import load_denoiser
from edmdistill.cli import main
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM, VP, Preconditioning
from edmdistill.networks.rounding import rounding_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [80.0, 2.5])
def test_the_error_is_what_is_measured(golden: Path, dtype: torch.dtype, sigma: float) -> None:
    """Within a factor of 2, as networks differ."""
    exact, rounded = (load_denoiser(golden / "vp-ddpmpp-uncond.pkl.gz", dtype=each) for each in (None, dtype))
    flow = exact.flow
    x = sigma * torch.randn(2, flow.img_channels, flow.img_resolution, flow.img_resolution)
    error = (exact(x, sigma) - rounded(x, sigma)).square().mean().sqrt() / flow.sigma_data
    assert 0.5 < rounding_error(flow, dtype, sigma) / float(error) < 2
    assert rounding_error(flow, None, sigma) == 0
    finer = FlowNetwork(flow.network, VP(sigma_data=flow.sigma_data / 8))
    assert rounding_error(finer, dtype, sigma) == pytest.approx(8 * rounding_error(flow, dtype, sigma))


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
