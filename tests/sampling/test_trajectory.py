"""Trajectories toward a reference, against closed forms: data N(MEAN, STD^2), whose jump and score are linear."""

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from edmdistill.checkpoints.config import CheckpointConfig, Provenance, describe
from edmdistill.checkpoints.generator import Generator
from edmdistill.errors import EdmDistillError
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.sampling.generate import sample
from edmdistill.sampling.trajectory import ReferenceGuidance, loss_gradient, paper_sigmas, reference_sampler

SD, MEAN, STD = 0.5, 0.3, 0.2
SIGMAS = torch.tensor([8.0, 4.0], dtype=torch.float64)
REFERENCE = torch.full((1, 4, 4), -0.7, dtype=torch.float64)


def variance(sigma: Tensor | float) -> Tensor:
    return torch.as_tensor(sigma, dtype=torch.float64) ** 2 + STD**2


def jump(x: Tensor, sigma: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    return MEAN + (x - MEAN) * (variance(s) / variance(sigma)).sqrt()


def denoiser(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    return MEAN + (x - MEAN) * STD**2 / variance(sigma)


def run(noise: Tensor, *, gamma: float = 0.6, randn_like=torch.randn_like, sigmas: Tensor = SIGMAS, **more) -> Tensor:
    reference = ReferenceGuidance(image=REFERENCE, features=lambda x: x, **more)
    return reference_sampler(
        jump, denoiser, noise, reference=reference, sigmas=sigmas, sigma_data=SD, gamma=gamma, randn_like=randn_like
    )


def mean_of_result(weight: float, correctors: int, step: float, gamma: float) -> float:
    """Of all, as no noise moves it: jump, contraction toward where score and pull cancel, jump."""
    ref = -0.7
    low = math.sqrt(1 - gamma**2) * 4.0
    x = float(jump(torch.tensor(ref, dtype=torch.float64), SIGMAS[0], torch.tensor(low, dtype=torch.float64), None))
    score, pull = 1 / (low**2 + STD**2), weight / (low**2 + SD**2)
    rest = (score * MEAN + pull * ref) / (score + pull)
    x = rest + (1 - (step * low) ** 2 / 2 * (score + pull)) ** correctors * (x - rest)
    return float(jump(torch.tensor(x, dtype=torch.float64), SIGMAS[1], torch.tensor(0.0), None))


def variance_of_result(weight: float, correctors: int, step: float, gamma: float) -> float:
    """Noise comes from the start, from the corrector and from what it aims at, and at last from gamma."""
    low = math.sqrt(1 - gamma**2) * 4.0
    V = float(variance(low) / variance(8.0)) * 8.0**2
    zeta, pull = (step * low) ** 2, weight / (low**2 + SD**2)
    for _ in range(correctors):
        V = (1 - zeta / 2 * (1 / float(variance(low)) + pull)) ** 2 * V + (zeta / 2 * pull * low) ** 2 + zeta
    return float(variance(0.0) / variance(4.0)) * (V + (gamma * 4.0) ** 2)


@pytest.mark.parametrize("gamma", [0.0, 0.6])
@pytest.mark.parametrize(("weight", "correctors"), [(1.0, 10), (0.0, 10), (5.0, 3), (1.0, 0)])
def test_the_mean_is_pulled_to_the_reference(weight: float, correctors: int, gamma: float) -> None:
    """Without noise the sampler's path is the mean's, for all is linear; and with noise it is the mean."""
    options = {"weight": weight, "correctors": correctors, "gamma": gamma}
    silent = run(torch.zeros(1, 1, 4, 4, dtype=torch.float64), randn_like=torch.zeros_like, **options)
    expected = mean_of_result(weight, correctors, 0.32, gamma)
    torch.testing.assert_close(silent, torch.full_like(silent, expected), rtol=1e-12, atol=1e-12)
    torch.manual_seed(0)
    many = run(torch.randn(4000, 1, 4, 4, dtype=torch.float64), **options)
    assert float(many.mean()) == pytest.approx(expected, abs=5 * float(many.std()) / 250)
    assert float(many.var()) == pytest.approx(variance_of_result(weight, correctors, 0.32, gamma), rel=0.03)


def test_a_stronger_pull_ends_nearer_and_none_keeps_the_law() -> None:
    means = [mean_of_result(weight, 200, 0.32, 0.6) for weight in (0.0, 0.5, 1.0, 4.0)]
    assert means == sorted(means, reverse=True)
    assert means[0] == pytest.approx(MEAN, abs=1e-3)
    torch.manual_seed(0)
    free = run(torch.randn(4000, 1, 4, 4, dtype=torch.float64), weight=0.0, correctors=200, step=0.1)
    assert float(free.std()) == pytest.approx(STD, rel=0.03)


def test_the_defaults_are_the_papers() -> None:
    defaults = {name: field.default for name, field in inspect.signature(ReferenceGuidance).parameters.items()}
    assert (defaults["weight"], defaults["correctors"]) == (1.0, 10)
    assert paper_sigmas(0.002, 80.0).tolist() == pytest.approx([8.596, 3.880], rel=1e-3)  # N = 2


def test_the_gradient_is_that_of_the_loss() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5)).double()
    torch.manual_seed(0)
    x, aim = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        cos = math.cos(math.atan(2.0 / SD))
        return (net(cos * x) - net(cos * aim)).square().sum() / 2 / SD**2

    with torch.no_grad():
        found = loss_gradient(net, x, aim, 2.0, SD)
        step = 1e-6 * torch.randn_like(x)
        change = (loss(x + step) - loss(x - step)) / 2
    assert float(change) == pytest.approx(float((found * step).sum()), rel=1e-6)


def network(two_time: bool = False) -> FlowNetwork:
    torch.manual_seed(0)
    net = UNet(8, 1, 3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    torch.nn.init.ones_(net.out_gain)
    flow = FlowNetwork(net, EDM())
    return (add_second_time(flow) if two_time else flow).eval().requires_grad_(False).double()


def generator(flow: FlowNetwork) -> Generator:
    config = CheckpointConfig(stage="generator", provenance=Provenance(source="a test"), **describe(flow))
    return Generator(flow, config)


def pulled_to(**more) -> ReferenceGuidance:
    image = torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    return ReferenceGuidance(image=image, features=lambda x: x, correctors=3, **more)


@pytest.mark.parametrize("kind", ["teacher", "generator", "two times"])
def test_every_kind_of_network_goes_the_same_way(kind: str) -> None:
    """A network that starts as the teacher gives the teacher's images, which no batch changes."""
    teacher = Denoiser(network())
    options = {"seeds": [3, 4, 5], "labels": 1, "gamma": 0.3}
    expected = sample(teacher, reference=pulled_to(), **options)
    model = {"teacher": teacher, "generator": generator(network()), "two times": generator(network(True))}[kind]
    found = sample(model, reference=pulled_to(score=teacher if kind == "generator" else None), batch=2, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_black_reference_and_one_jump_are_plain_sampling() -> None:
    options = {"seeds": [7, 8], "times": [1.56]}
    nowhere = ReferenceGuidance(image=torch.zeros(1, 8, 8), features=lambda x: x)
    found = sample(Denoiser(network()), reference=nowhere, **options)
    torch.testing.assert_close(found, sample(generator(network()), **options), rtol=1e-6, atol=1e-6)


def test_the_features_are_asked_twice_a_corrector() -> None:
    seen: list[Tensor] = []
    pulled = ReferenceGuidance(image=torch.zeros(1, 8, 8), features=lambda x: (seen.append(x), x)[1])
    sample(Denoiser(network()), seeds=[7], reference=pulled)
    assert len(seen) == 2 * 10


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: generator(network()), {}, "name its teacher as score"),
        (lambda: Denoiser(network()), {"gamma": 1.0}, r"gamma must be in \[0, 1\)"),
        (lambda: Denoiser(network()), {"nfe": 3}, "have no effect"),
        (
            lambda: Denoiser(network()),
            {"reference": ReferenceGuidance(image=torch.zeros(3, 8, 8), features=abs)},
            "the reference is",
        ),
    ],
)
def test_mistakes(model, options: dict, message: str) -> None:
    with pytest.raises(EdmDistillError, match=message):
        sample(model(), seeds=[0], **{"reference": pulled_to(), **options})
