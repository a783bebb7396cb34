"""The tangent of every kind of network: against func.jvp, finite differences and a closed form."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_set import NETWORKS
from processes import run_by_two
from tangent_points import CONTINUOUS, SPEED, TIMES, classes, normal
from tolerance import assert_rounded, depth, rounding
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from edmdistill.checkpoints.nvidia import read_official
from edmdistill.checkpoints.official import build_official
from edmdistill.errors import TrainingError
from edmdistill.kernels.dual import Dual
from edmdistill.networks.base import Conditioning, Network
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.trigflow import diffuse, expand, velocity

MakeFlow = Callable[..., FlowNetwork]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def jvp(F: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        tangent: Tensor = torch.func.jvp(F, at, along)[1]
    return tangent


def slope(F: Callable[[float], Tensor], h: float = 1e-5) -> Tensor:
    """dF(h)/dh at 0 by central differences of order 6."""
    return sum((F(n * h) - F(-n * h)) * weight for n, weight in ((1, 45), (2, -9), (3, 1))) / (60 * h)


@pytest.fixture(params=CONTINUOUS)
def flow(make_flow: MakeFlow, request: pytest.FixtureRequest) -> FlowNetwork:
    """In float64; iDDPM has no tangent in time."""
    return make_flow(request.param, torch.float64)


def test_the_last_layer_is_watched_beside_a_tangent(flow: FlowNetwork) -> None:
    """Its gradient, by which an adversarial loss is balanced, is autograd's."""
    x, dx, labels = normal(flow), normal(flow, 2), classes(flow)
    with flow.watch() as last:
        F, _ = flow(x, TIMES, labels, along=(dx, SPEED))
    loss = F.sin().sum()
    (expected,) = torch.autograd.grad(loss, flow.network.last_layer.weight, retain_graph=True)
    assert error(last.gradient(loss), expected.flatten()) <= rounding(F.dtype, depth(flow))


@torch.no_grad()
def test_tangents_of_images_and_both_times(flow: FlowNetwork) -> None:
    flow = add_second_time(flow)
    flow.network.get_parameter("second_time.gain").fill_(0.3)
    x, dx, labels = normal(flow), normal(flow, 2), classes(flow)
    F, dF = flow.tangent(x, TIMES, labels, dx, SPEED, TIMES.flip(0), SPEED.flip(0))
    assert torch.equal(F, flow(x, TIMES, labels, TIMES.flip(0)))
    along = dx, SPEED, SPEED.flip(0)
    exact = jvp(lambda x, t, second: flow(x, t, labels, second), (x, TIMES, TIMES.flip(0)), along)
    assert error(dF, exact) <= rounding(dF.dtype, depth(flow))
    moved = slope(lambda h: flow(x + h * dx, TIMES + h * SPEED, labels, (TIMES + h * SPEED).flip(0)))
    assert error(dF, moved) <= 1e-8
    _, standing = flow.tangent(x, TIMES, labels, dx, SPEED, TIMES.flip(0))
    assert error(standing, slope(lambda h: flow(x + h * dx, TIMES + h * SPEED, labels, TIMES.flip(0)))) <= 1e-8


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_golden_networks(golden: Path, name: str) -> None:
    network = build_official(read_official(golden / name))[0].network.eval()
    x, dx, labels = normal(network), normal(network, 2), classes(network)
    c_noise = torch.tensor([20.0, 400.0, 900.0] if name.startswith(("vp", "iddpm")) else [-0.9, 0.1, 0.8])
    dc = SPEED.float()

    def F(x: Tensor, c_noise: Tensor) -> Tensor:
        out: Tensor = network(x, Conditioning(c_noise, labels))
        return out

    with sdpa_kernel(SDPBackend.MATH):  # as func.jvp takes it
        out = network(Dual(x, dx), Conditioning(Dual(c_noise, dc), labels))
        assert torch.equal(out.value, F(x, c_noise))
    assert error(out.tangent, jvp(F, (x, c_noise), (dx, dc))) <= rounding(x.dtype, depth(network))
    network.double()
    x, dx, c_noise, dc = x.double(), dx.double(), c_noise.double(), dc.double()
    out = network(Dual(x, dx), Conditioning(Dual(c_noise, dc), labels))
    assert error(out.tangent, slope(lambda h: F(x + h * dx, c_noise + h * dc))) <= 1e-8


@torch.no_grad()
def test_linear_in_the_tangents(flow: FlowNetwork) -> None:
    x, dx, labels, nothing = normal(flow), normal(flow, 2), classes(flow), torch.zeros(3)
    one, other, both, none = (
        flow.tangent(x, TIMES, labels, *along)[1]
        for along in ((dx, nothing), (dx * 0, SPEED), (3 * dx, -2 * SPEED), (dx * 0, nothing))
    )
    assert error(3 * one - 2 * other, both) <= rounding(both.dtype, depth(flow))
    assert not none.any()


class Gaussian(Network):
    """F_raw of EDM's preconditioning where the data is Gaussian: its ODE leaves an image's place in the bell alone."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        two_time: bool = False,
        positional_time: bool = False,
        guided: bool = False,
    ) -> None:
        super().__init__(locals(), img_channels)
        generator = torch.Generator().manual_seed(0)
        shape = img_channels, img_resolution, img_resolution
        self.mean, self.std = (nn.Parameter(torch.rand(shape, generator=generator).double()) for _ in range(2))

    def embed_time(self, layers: Any, c_noise: Any, early: Any = 0.0) -> Any:
        return c_noise

    def finish_embedding(self, emb: Any, condition: Conditioning) -> Any:
        return emb

    def encode(self, x: Any, c_noise: Any, dropout_keys: None) -> Any:
        return [x]

    def decode(self, skips: Any, c_noise: Any, dropout_keys: None) -> Any:
        (x,) = skips
        tan = (4 * c_noise).exp()[:, None, None, None] / 0.5
        cos = 1 / (tan**2 + 1).sqrt()
        sin = cos * tan
        variance = cos**2 * self.std**2 + sin**2 * 0.25
        centered = 0.5 * x - cos * self.mean
        return (sin * self.mean + cos * sin * (self.std**2 - 0.25) / variance * centered) / 0.5


@torch.no_grad()
def test_gaussian_data() -> None:
    """x_t = cos(t) m + V^(1/2) w along the ODE, V = cos^2 s^2 + sin^2 sd^2, so F = dx_t/dt / sd has a closed form."""
    network = Gaussian(8, 2)
    flow, m, s2, w = FlowNetwork(network, EDM()), network.mean, network.std**2, normal(network)
    t = TIMES.reshape(3, 1, 1, 1)
    cos, sin, gap = t.cos(), t.sin(), 0.25 - s2
    V = cos**2 * s2 + sin**2 * 0.25
    F = (-sin * m + cos * sin * gap / V.sqrt() * w) / 0.5
    dF = (-cos * m + gap * w * ((cos**2 - sin**2) / V.sqrt() - (cos * sin) ** 2 * gap / V**1.5)) / 0.5
    x_t = cos * m + V.sqrt() * w
    with torch.enable_grad():
        found = flow(x_t, TIMES, along=(0.5 * F, torch.ones(3)))
        (slope,) = torch.autograd.grad(found[0].sum(), network.mean)
    torch.testing.assert_close(found, (F, dF), rtol=1e-12, atol=1e-12)
    # F = (-sin m + cos sin gap (x_t - cos m) / V) / sd at a given x_t.
    torch.testing.assert_close(slope, ((-sin - cos**2 * sin * gap / V) / 0.5).expand_as(w).sum(0))


@torch.no_grad()
def test_rearranged_along_a_trajectory(flow: FlowNetwork) -> None:
    """cos(t) sin(t) dF/dt at both ends of the circle, t = .02 and pi/2 - .02."""
    x0, z, labels = normal(flow) * 0.5, normal(flow, 2) * 0.5, classes(flow)
    for t in (torch.tensor([x]).double() for x in (0.02, 0.8, math.pi / 2 - 0.02)):
        r = t.cos() * t.sin()
        dx = expand(r, x0) * velocity(x0, z, t)
        _, found = flow.tangent(diffuse(x0, z, t), t.expand(3), labels, dx, r.expand(3))
        moved = slope(lambda h, t=t, r=r: flow(diffuse(x0, z, t + h * r), t + h * r, labels), h=3e-5)
        assert error(found, moved) <= 1e-8


@torch.no_grad()
def test_the_rearranged_condition_has_one_slope_everywhere() -> None:
    t = torch.tensor([1e-6, 0.02, 0.8, math.pi / 2 - 1e-6], dtype=torch.float64)
    c_noise = EDM().trigflow(Dual(t, t.cos() * t.sin()))[-1]
    torch.testing.assert_close(c_noise.tangent, torch.full_like(t, 0.25), rtol=1e-9, atol=0)


@torch.no_grad()
def test_no_tangent_beyond_the_times_that_the_network_knows(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2")
    ends = torch.tensor([0.0, 1e-3, math.pi / 2], dtype=torch.float64)
    assert not flow.tangent(normal(flow), ends, None, normal(flow) * 0, SPEED)[1].any()


@torch.no_grad()
def test_iddpm_has_a_tangent_in_space_alone(make_flow: MakeFlow) -> None:
    flow = make_flow("adm-iddpm", torch.float64)
    x, dx = normal(flow), normal(flow, 2)
    with pytest.raises(TrainingError, match=r"1000 discrete noise levels.* use a teacher with EDM"):
        flow.tangent(x, TIMES, None, dx, SPEED)
    assert error(flow(Dual(x, dx), TIMES).tangent, slope(lambda h: flow(x + h * dx, TIMES))) <= 1e-8


@pytest.mark.parametrize("case", ["ncsnpp-ve", "adm", "edm2"])
def test_the_dropout_of_the_next_forward_pass(make_flow: MakeFlow, case: str) -> None:
    """Of features, and of labels where the network drops them."""
    flow = make_flow(case, torch.float64, dropout=0.4, label_dropout=0.5).train()
    x, dx, labels = normal(flow), normal(flow, 2), classes(flow)
    tangents = []
    for seed in 1, 2:

        def forward(h: float, seed: int = seed) -> Tensor:
            torch.manual_seed(seed)
            return flow(x + h * dx, TIMES + h * SPEED, labels)

        torch.manual_seed(seed)
        F_minus, dF = flow.tangent(x, TIMES, labels, dx, SPEED)
        F = flow(x, TIMES, labels)
        assert torch.equal(F, forward(0.0))
        assert torch.equal(F, F_minus)
        assert (F.requires_grad, F_minus.requires_grad, dF.requires_grad) == (True, False, False)
        with torch.no_grad():
            assert error(dF, slope(forward)) <= 1e-8
        tangents.append(dF)
    assert error(*tangents) > 0.1


def test_forward_ad_is_refused(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2")
    x = normal(flow)
    with pytest.raises(ValueError, match=r"func\.jvp"):
        torch.func.jvp(lambda x: flow.tangent(x, TIMES, None, x, SPEED)[1], (x,), (x,))


def test_checkpointed_blocks(make_flow: MakeFlow) -> None:
    flow = make_flow("edm2", dropout=0.3).train()
    point, along = (normal(flow), TIMES, classes(flow)), (normal(flow, 2), SPEED)
    torch.manual_seed(1)
    expected = flow.tangent(*point, *along)
    flow.network.checkpoint_blocks()
    F, dF = flow.tangent(*point, *along)
    assert torch.equal(F, expected[0])
    assert torch.equal(dF, expected[1])
    assert torch.equal(F, flow(*point))


def test_on_the_meta_device(make_flow: MakeFlow) -> None:
    flow = make_flow("adm").to("meta")
    x, t, labels = normal(flow), TIMES.to("meta"), torch.eye(5, device="meta")[:3]
    F, dF = flow.tangent(x, t, labels, x, t)
    assert F.shape == dF.shape == (3, 3, 8, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        pytest.param("edm2", {"channel_mult": [1], "attn_resolutions": [8]}, id="edm2 of one resolution"),
        *(pytest.param(case, {}, id=case, marks=pytest.mark.slow) for case in ("edm2", "adm", "ddpmpp")),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_traced_in_one_graph_with_two_convolutions_a_layer(
    make_flow: MakeFlow, case: str, arguments: dict[str, Any]
) -> None:
    flow = make_flow(case, **arguments)
    point = normal(flow), TIMES, classes(flow), normal(flow, 2), SPEED
    expected = flow.tangent(*point)
    convolutions = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        convolutions.append(sum(node.target is torch.conv2d for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    flow.network.compile(backend=count, fullgraph=True)
    flow(*point[:3])
    found = flow.tangent(*point)
    for traced, eager in zip(found, expected, strict=True):
        assert_rounded(traced, eager, depth(flow))
    plain, dual = convolutions
    assert dual == 2 * plain > 0


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled(make_flow: MakeFlow) -> None:
    """By inductor, which needs a C++ compiler."""
    flow = make_flow("edm2")
    arguments = normal(flow), TIMES, classes(flow), normal(flow, 2), SPEED
    expected = flow.tangent(*arguments)
    torch.compiler.reset()
    flow.network.compile(fullgraph=True)
    for found, eager in zip(flow.tangent(*arguments), expected, strict=True):
        assert error(found, eager) <= 1e-6


@pytest.mark.slow  # sCD's turns, which take tangents, are spread in tests/machine/test_engine.py
def test_on_two_processes() -> None:
    run_by_two(Path(__file__).with_name("spread.py"))
