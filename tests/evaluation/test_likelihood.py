"""The likelihood against closed forms, and what a measurement of it passes on and says."""

import math
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.order import indices
from edmdistill.errors import DatasetError, EdmDistillError
from edmdistill.evaluation.images import BLOCKS
from edmdistill.evaluation.likelihood import SOLVER_TOLERANCE, evaluate_likelihood, log_likelihood, predict_noise
from edmdistill.evaluation.pipeline import image_digests, pixels_sha256
from edmdistill.evaluation.results import read_results, results_json, results_table
from edmdistill.evaluation.tables import GeneratorId, result_tables
from edmdistill.kernels.linear import tf32_allowed
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM, IDDPM, VE, VP
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.sampling.seeds import SeededNoise
from edmdistill.trigflow import sigma_to_time

LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0}
DIGITS = open_dataset("digits", split="test")


def bits(nats: Tensor, dims: int) -> Tensor:
    return nats / (dims * math.log(2))


def log_normal(x: Tensor, mean: float, variance: float) -> Tensor:
    return (-0.5 * (x - mean) ** 2 / variance - 0.5 * math.log(2 * math.pi * variance)).flatten(1).sum(1)


def normal(N: int, *shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("tolerance", "error"), [(1e-3, 6e-3), (SOLVER_TOLERANCE, 1e-3)])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.3, 0.1)])
def test_gaussian_data(mean: float, std: float, tolerance: float, error: float) -> None:
    """Each image of N(mean, std^2), in bits; that the prior lacks the mean moves the mean by less than 2e-4."""

    def noise(x: Tensor, sigma: Tensor, direction: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        rate = (sigma / (std**2 + sigma**2))[:, None, None, None]
        return rate * (x - mean), rate * direction

    variance, far = std**2 + LEVELS["sigma_min"] ** 2, std**2 + LEVELS["sigma_max"] ** 2
    x = mean + math.sqrt(variance) * normal(50, 3, 4, 4)
    found = log_likelihood(noise, x, normal(50, 3, 4, 4).sign(), tolerance=tolerance, **LEVELS).value
    end = mean + (x - mean) * math.sqrt(far / variance)
    exact = log_normal(end, 0, LEVELS["sigma_max"] ** 2) + 48 * 0.5 * math.log(far / variance)
    assert float(bits(found - exact, 48).abs().max()) < error
    truth = log_normal(x, mean, variance)
    assert float(bits(exact - truth, 48).mean().abs()) < 2e-4


def test_the_mean_over_all_probes_is_exact() -> None:
    """Data whose four numbers depend on one another: no probe has the trace, and all sixteen together have."""
    mix = torch.tensor([[0.5, 0.2, 0, 0.1], [0, 0.3, 0.1, 0], [0.1, 0, 0.4, 0.2], [0, 0, 0, 0.2]], dtype=torch.float64)
    covariance = mix @ mix.T

    def noise(x: Tensor, sigma: Tensor, direction: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        inner = torch.linalg.inv(covariance + sigma[:, None, None] ** 2 * torch.eye(4)) * sigma[:, None, None]

        def through(y: Tensor) -> Tensor:
            return (inner @ y.reshape(-1, 4, 1)).reshape(y.shape)

        return through(x), through(direction)

    probes = torch.tensor(list(product((-1.0, 1.0), repeat=4))).reshape(16, 1, 2, 2)
    x = (mix @ normal(4, 1)).reshape(1, 1, 2, 2).expand(16, 1, 2, 2)
    found = log_likelihood(noise, x, probes, tolerance=1e-7, **LEVELS).value
    law = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), covariance)
    assert float(found.mean()) == pytest.approx(float(law.log_prob(x[0].flatten())), abs=2e-4)
    assert float(found.std()) > 0.05


def flow(preconditioning=EDM, classes: int = 10, **more) -> FlowNetwork:
    torch.manual_seed(0)
    arguments = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), **more}
    network = UNet(8, 1, classes, **arguments)
    torch.nn.init.constant_(network.out_gain, 0.5)
    for block in network.blocks():
        torch.nn.init.ones_(block.emb_gain)  # 0 at first, so that nothing is felt of time and class
    return FlowNetwork(network, preconditioning()).eval().requires_grad_(False).double()


@pytest.mark.parametrize("preconditioning", [EDM, VP, VE])
def test_the_noise_is_the_denoisers_and_moves_as_it_does(preconditioning) -> None:
    model = Denoiser(flow(preconditioning))
    sigma = torch.tensor([0.05, 0.7, 9.0, 60.0], dtype=torch.float64)
    x = normal(4, 1, 8, 8) * (sigma**2 + 0.25).sqrt()[:, None, None, None]
    direction = normal(8, 1, 8, 8)[4:].sign()
    labels = torch.eye(10, dtype=torch.float64)
    rows = torch.tensor([3, 1, 4, 1])

    def through_D(x: Tensor) -> Tensor:
        return (x - model(x, sigma, labels[rows])) / sigma[:, None, None, None]

    n, change = predict_noise(model.flow, labels)(x, sigma, direction, rows)
    step = 1e-5 * direction
    torch.testing.assert_close(n, through_D(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(change, (through_D(x + step) - through_D(x - step)) / 2e-5, rtol=1e-6, atol=1e-6)


def two_time(**more) -> FlowNetwork:
    net = add_second_time(flow(**more)).eval().requires_grad_(False).double()
    torch.nn.init.constant_(net.network.second_time.gain, 0.7)
    return net


def test_a_network_of_two_times_is_asked_at_the_diagonal() -> None:
    net = two_time()
    x, sigma = normal(2, 1, 8, 8), torch.tensor([0.4, 3.0], dtype=torch.float64)
    n, _ = predict_noise(net, None)(x, sigma, x.sign(), torch.arange(2))
    t = sigma_to_time(sigma, 0.5)
    cos, sin = t.cos()[:, None, None, None], t.sin()[:, None, None, None]
    torch.testing.assert_close(n, sin * cos * x / 0.5 + cos * net(cos * x, t, None, t), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(net(cos * x, t, None, t), net(cos * x, t, None), atol=1e-3)


def generator(net: FlowNetwork) -> Generator:
    provenance = Provenance(source="a test")
    return Generator(net, CheckpointConfig(stage="generator", method="ctm", provenance=provenance, **describe(net)))


def test_an_image_does_not_depend_on_the_others_and_the_network_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = generator(two_time(dropout=0.5)).train()
    done: list[int] = []
    results = []
    for block in (3, 1):
        monkeypatch.setitem(BLOCKS, 16, block)
        results.append(evaluate_likelihood(model, DIGITS, count=3, probes=2, tolerance=0.05, on_progress=done.append))
    many, one = results
    assert many.metrics == pytest.approx(one.metrics, rel=1e-12)
    assert (many.protocol, many.sampler) == (one.protocol, one.sampler)
    assert done == [3, 3] + [1] * 6
    assert model.training


def test_the_numbers_are_those_of_the_images_and_probes() -> None:
    model = Denoiser(flow())
    first, second, both = (evaluate_likelihood(model, DIGITS, count=n, probes=p, tolerance=0.05).metrics for n, p in
                           ((1, 3), (2, 1), (2, 3)))  # fmt: skip
    assert set(both) == {"nll@2", "nll_image_error@2", "nll_probe_std@2"}
    assert set(second) == {"nll@2", "nll_image_error@2"}
    assert set(first) == {"nll@1", "nll_probe_std@1"}
    other = 2 * both["nll@2"] - first["nll@1"]  # the second image's
    assert both["nll_image_error@2"] == pytest.approx(abs(other - first["nll@1"]) / 2)
    # A network of 0 sees noise of N(0, 1/4) alone: its likelihood is the closed form, in bits of pixels.
    torch.nn.init.zeros_(model.flow.network.out_gain)
    found = evaluate_likelihood(model, DIGITS, count=4, probes=2, tolerance=1e-4).metrics
    pixels = DIGITS.images(indices(0, 0, 4, len(DIGITS))).double()
    spread = (pixels / 127.5 - 1).square() + 1 / 12 / 127.5**2
    variance = 0.25 + 0.002**2
    nats = 0.5 * math.log(2 * math.pi * variance) + spread / 2 / variance
    assert found["nll@4"] == pytest.approx(float(nats.mean()) / math.log(2) + math.log2(127.5), abs=1e-3)
    assert found["nll_probe_std@4"] < 1e-6


def test_products_are_exact_float32() -> None:
    """On CUDA; afterwards TF32 is allowed as it was."""
    model, seen = Denoiser(flow()), set()
    model.flow.network.register_forward_hook(lambda *_: seen.add(torch.backends.cudnn.allow_tf32))
    with tf32_allowed(True):
        evaluate_likelihood(model, DIGITS, count=1, probes=1, tolerance=0.5)
        assert torch.backends.cudnn.allow_tf32
    assert seen == {False}


def test_classes_are_passed_on() -> None:
    model = Denoiser(flow())
    own = evaluate_likelihood(model, DIGITS, count=3, probes=1).metrics
    classes = DIGITS.labels(range(297))
    assert classes is not None
    moved = Dataset("digits", "test", DIGITS.files, lambda i: DIGITS.images([i])[0].numpy(), (classes.numpy() + 1) % 10)
    other = evaluate_likelihood(model, moved, count=3, probes=1).metrics
    assert abs(other["nll@3"] - own["nll@3"]) > 1e-4


def test_the_record_says_what_was_computed() -> None:
    """From what it holds alone, the same number again: the images' order, their seeds, and the solver's settings."""
    net = flow(classes=0)
    result = evaluate_likelihood(Denoiser(net), DIGITS, count=2, probes=1, tolerance=1e-3, source="here")
    known, reference = result.protocol.likelihood, result.protocol.reference
    assert known is not None
    assert reference is not None
    chosen = indices(0, 0, 2, len(DIGITS)).tolist()
    pixels, rng = DIGITS.images(chosen), SeededNoise(chosen)
    x = (pixels + rng.uniform((1, 8, 8)) - 0.5) / 127.5 - 1
    solver = {name: getattr(known, name) for name in ("sigma_min", "sigma_max", "tolerance", "rho")}
    value, calls = log_likelihood(predict_noise(net, None), x, rng.signs((1, 8, 8)), **solver)
    found = math.log2(127.5) - float(bits(value, 64).mean())
    assert result.metrics["nll@2"] == pytest.approx(found, rel=1e-12)
    assert result.sampler is not None
    assert result.sampler.nfe == round(float(calls.double().mean())) < int(calls.max())
    assert reference.sha256 == pixels_sha256((1, 8, 8), image_digests(pixels))
    assert (result.protocol.labels, result.provenance["source"]) == ("none", "here")


def test_the_result_says_how_and_stands_in_tables(tmp_path: Path) -> None:
    result = evaluate_likelihood(Denoiser(flow()), DIGITS, count=3, probes=1, tolerance=1e-2, source="here")
    protocol = result.protocol
    assert (protocol.name, protocol.n, protocol.labels, protocol.features, protocol.seeds) == (
        "nll", 3, "given", None, None
    )  # fmt: skip
    assert protocol.reference is not None
    assert (protocol.reference.source, protocol.reference.split, protocol.reference.n) == ("digits", "test", 3)
    known = msgspec.to_builtins(protocol)["likelihood"]
    assert {name: known[name] for name in ("probes", "tolerance", "sigma_min", "sigma_max")} == {
        "probes": 1, "tolerance": 1e-2, **LEVELS
    }  # fmt: skip
    assert result.sampler is not None
    assert result.sampler.solver == "rk45"
    assert results_table([result]).startswith("protocol nll: bits per dimension of digits (test, 3)")
    (tmp_path / "nll.json").write_text(results_json([result]))
    (read,) = read_results([tmp_path / "nll.json"])
    assert read.protocol == protocol
    assert read.protocol.sha256() == result.protocol_sha256
    (table,) = result_tables([read], GeneratorId("", 0))
    assert table.rows[1][0] == "teacher"
    assert table.rows[1][-1].startswith("rk45")
    assert "bits per dimension of digits (test, 3 images)" in table.caption
    assert not table.curves


def colors() -> Dataset:
    return Dataset("colors", "train", ["a"], lambda i: np.zeros((3, 8, 8), np.uint8), np.zeros(1, np.int64))


def few() -> Dataset:
    return Dataset("few", "train", ["a"], lambda i: np.zeros((1, 8, 8), np.uint8))


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (lambda: generator(flow()), lambda: DIGITS, EdmDistillError, "only jumps to the data"),
        (lambda: Denoiser(flow(IDDPM)), lambda: DIGITS, EdmDistillError, "its ODE cannot be solved with adaptive"),
        (lambda: Denoiser(flow()), colors, DatasetError, "are 3x8x8"),
        (lambda: Denoiser(flow()), few, DatasetError, "no classes, but the network has 10"),
    ],
)
def test_what_has_no_likelihood(model, data, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate_likelihood(model(), data())
