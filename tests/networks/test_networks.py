"""What every network does, whatever its kind."""

import inspect
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edmdistill.kernels import winograd
from edmdistill.networks import NETWORKS, new_network
from edmdistill.networks.base import Conditioning
from edmdistill.networks.flow import Denoiser, FlowNetwork
from edmdistill.networks.surgery.two_time import add_second_time
from edmdistill.schedules import edm_sigmas
from edmdistill.trigflow import denoised, expand, sigma_to_time

MakeFlow = Callable[..., FlowNetwork]


def images(flow: FlowNetwork, n: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, flow.img_channels, flow.img_resolution, flow.img_resolution, dtype=flow.dtype)


def classes(flow: FlowNetwork, n: int = 3) -> Tensor | None:
    return torch.arange(n) % flow.label_dim if flow.label_dim else None


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


TIMES = torch.tensor([0.05, 0.8, 1.5], dtype=torch.float64)


@torch.no_grad()
def test_trigflow_is_edm(wide: FlowNetwork) -> None:
    sigma = edm_sigmas(9, wide.sigma_min, wide.sigma_max)
    x0, n = images(wide, 9), torch.randn(images(wide, 9).shape, dtype=torch.float64)
    x = x0 * 0.5 + expand(sigma, x0) * n
    t = sigma_to_time(sigma, wide.sigma_data)
    x_t = expand(t, x).cos() * x
    labels = classes(wide, 9)
    found = denoised(x_t, wide(x_t, t, labels), t, wide.sigma_data)
    expected = Denoiser(wide)(x, sigma, labels)
    for i in range(9):
        assert error(found[i], expected[i]) <= 1e-12


@pytest.mark.parametrize("case", ["ddpmpp", "edm2"])
def test_folded_networks_use_winograd_without_gradients(
    case: str, make_flow: MakeFlow, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_threads(1)
    monkeypatch.setattr(winograd, "least_channels", lambda: 64)  # on any processor
    flow = make_flow(case, img_resolution=16, model_channels=64, channel_mult=[1], attn_resolutions=[])
    x, t = images(flow, 1), torch.tensor(0.7)
    flow.network.fold(sample=False)
    expected = flow(x, t).detach()
    with torch.no_grad():
        assert torch.equal(flow(x, t), expected)
        flow.network.fold()
        found = flow(x, t)
    assert torch.equal(flow(x, t), expected)
    assert 0 < error(found, expected) <= 1e-5


@torch.no_grad()
def test_one_time_for_all_is_one_for_each(flow: FlowNetwork) -> None:
    x, t = images(flow), torch.tensor(0.7)
    for view in (flow, Denoiser(flow)):
        assert error(view(x, t, classes(flow)), view(x, t.expand(3), classes(flow))) <= 1e-5
    assert torch.equal(Denoiser(flow)(x, 0.7, classes(flow)), Denoiser(flow)(x, t, classes(flow)))  # the same call


@torch.no_grad()
def test_images_do_not_see_each_other(flow: FlowNetwork) -> None:
    x, labels = images(flow), classes(flow)
    together = flow(x, TIMES, labels)
    for i in range(3):
        alone = flow(x[i : i + 1], TIMES[i : i + 1], None if labels is None else labels[i : i + 1])
        assert error(alone[0], together[i]) <= 1e-5


@torch.no_grad()
def test_the_ends_of_the_circle_are_finite(flow: FlowNetwork) -> None:
    x = images(flow)
    ends = flow(x, torch.tensor([0.0, math.pi / 2, math.pi / 2]), classes(flow))
    assert bool(ends.isfinite().all())
    latest = sigma_to_time(flow.sigma_max, flow.sigma_data)
    torch.testing.assert_close(flow(x, torch.tensor(math.pi / 2)), flow(x, latest), rtol=0, atol=0)


def test_tangents(wide: FlowNetwork) -> None:
    """Along images and time, by torch.func.jvp, against finite differences."""
    x, v = images(wide), torch.randn(images(wide).shape, dtype=torch.float64)
    t, h = torch.tensor([0.3, 0.8, 1.3], dtype=torch.float64), 1e-6
    speed = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)

    def F(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = wide(x, t, classes(wide))
        return out

    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        _, found = torch.func.jvp(F, (x, t), (v, speed))
        difference = (F(x + h * v, t + h * speed) - F(x - h * v, t - h * speed)) / (2 * h)
    assert error(found, difference) <= 1e-6


def test_forward_leaves_the_network_as_it_is(flow: FlowNetwork) -> None:
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    versions = {name: value._version for name, value in flow.state_dict(keep_vars=True).items()}
    flow.train()
    x = images(flow)
    untouched = x.clone()
    flow(x, TIMES, classes(flow)).square().sum().backward()
    for name, value in flow.state_dict(keep_vars=True).items():
        assert value._version == versions[name], name
        torch.testing.assert_close(value.data, before[name], rtol=0, atol=0)
    torch.testing.assert_close(x, untouched, rtol=0, atol=0)


def test_every_parameter_learns(flow: FlowNetwork) -> None:
    network = flow.network
    augment = torch.randn(3, 9) if getattr(network, "map_augment", None) is not None else None
    labels = torch.eye(5)[:3] if flow.label_dim else None
    condition = Conditioning(torch.tensor([-1.0, 0.0, 1.0]), labels, augment_labels=augment)
    network(images(flow), condition).square().sum().backward()
    for name, parameter in network.named_parameters():
        if "logvar" not in name:  # a head of its own
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiles_in_one_graph(flow: FlowNetwork) -> None:
    two = add_second_time(flow)
    labels = torch.eye(5)[:3] if flow.label_dim else None
    call = images(flow), TIMES, labels, TIMES.flip(0)
    torch.compiler.reset()
    compiled = torch.compile(two, backend="aot_eager", fullgraph=True)
    expected, found = two(*call), compiled(*call)
    assert error(found.detach(), expected.detach()) <= 1e-5
    gain = two.network.get_parameter("second_time.gain")
    grads = [torch.autograd.grad(F.square().sum(), gain)[0] for F in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(flow: FlowNetwork, dtype: torch.dtype) -> None:
    x = images(flow)
    expected = flow(x, TIMES[:1], classes(flow))
    flow.compute_dtype = dtype
    found = flow(x, TIMES[:1], classes(flow))
    assert found.dtype == torch.float32
    assert error(found, expected) <= (0.01 if dtype == torch.float16 else 0.08)


@torch.no_grad()
def test_labels(flow: FlowNetwork) -> None:
    x = images(flow)
    if not flow.label_dim:
        torch.testing.assert_close(flow(x, TIMES, torch.tensor([7, 8, 9])), flow(x, TIMES), rtol=0, atol=0)
        return
    by_number = flow(x, TIMES, torch.tensor([0, 1, 4]))
    torch.testing.assert_close(flow(x, TIMES, torch.eye(5)[[0, 1, 4]]), by_number, rtol=0, atol=0)
    assert error(flow(x, TIMES), by_number) > 1e-3
    torch.testing.assert_close(flow(x, TIMES, torch.zeros(3, 5)), flow(x, TIMES))
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=f"class {wrong} does not exist: this network's classes run from 0 to 4"):
            flow(x, TIMES, torch.tensor([0, wrong, 1]))


@torch.no_grad()
@pytest.mark.parametrize("case", ["ncsnpp-ve", "adm", "edm2"])
def test_label_dropout_is_for_training(make_flow: MakeFlow, case: str) -> None:
    flow = make_flow(case, label_dropout=1.0, dropout=0.0)
    x, labels = images(flow), classes(flow)
    assert error(flow(x, TIMES, labels), flow(x, TIMES)) > 1e-3
    torch.testing.assert_close(flow.train()(x, TIMES, labels), flow(x, TIMES))


@torch.no_grad()
def test_augment_labels(make_flow: MakeFlow) -> None:
    network = make_flow("ddpmpp").network
    x, c_noise = torch.randn(3, 3, 8, 8), torch.zeros(3)
    cases = None, torch.zeros(3, 9), torch.ones(3, 9)
    plain, none, some = (network(x, Conditioning(c_noise, augment_labels=labels)) for labels in cases)
    torch.testing.assert_close(none, plain)
    assert error(some, plain) > 1e-3


def test_the_arguments_make_the_network_again(flow: FlowNetwork) -> None:
    network = flow.network
    arguments = json.loads(json.dumps(network.arguments))
    with torch.device("meta"):
        again = type(network)(**arguments)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in network.state_dict().items()
    }
    assert again.arguments == network.arguments


def test_what_song_does_not_know(make_flow: MakeFlow) -> None:
    with pytest.raises(ValueError, match="learned', where positional or fourier is needed"):
        make_flow("ddpmpp", embedding_type="learned")


UNET = {"channel_mult": (1, 2, 3, 4), "num_blocks": 3, "model_channels": 192}
OFFICIAL: dict[str, dict[str, object]] = {
    "song": {"label_dim": 0, "augment_dim": 0, "model_channels": 128, "channel_mult": (1, 2, 2, 2)}
    | {"channel_mult_emb": 4, "num_blocks": 4, "attn_resolutions": (16,), "dropout": 0.1, "label_dropout": 0}
    | {"embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard"}
    | {"decoder_type": "standard", "resample_filter": (1, 1)},
    "adm": UNET
    | {"label_dim": 0, "augment_dim": 0, "channel_mult_emb": 4, "attn_resolutions": (32, 16, 8)}
    | {"dropout": 0.1, "label_dropout": 0},
    "edm2": UNET
    | {"channel_mult_noise": None, "channel_mult_emb": None, "attn_resolutions": (16, 8), "label_balance": 0.5}
    | {"concat_balance": 0.5, "resample_filter": (1, 1), "channels_per_head": 64, "dropout": 0.0}
    | {"res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256, "logvar_channels": 128},
}


@pytest.mark.parametrize("kind", OFFICIAL)
def test_what_an_official_file_leaves_out_has_the_official_default(kind: str) -> None:
    """What the official classes do not know is off."""
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(NETWORKS[kind]).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert {name: default for name, default in own.items() if name in OFFICIAL[kind]} == OFFICIAL[kind]
    off = {"logvar_heads": 1, "adaptive_scale": True, "group_channels": 4}
    for name in own.keys() - OFFICIAL[kind].keys():
        assert own[name] == off.get(name, 0), name


# The published networks; the numbers of parameters are those of the papers' tables.
CIFAR = (32, 3, 0)
DDPMPP = {"channel_mult": [2, 2, 2], "augment_dim": 9}
IMAGENET64, LATENT = (64, 3, 1000), (64, 4, 1000)


@pytest.mark.parametrize(
    ("kind", "images", "arguments", "millions"),
    [
        ("song", CIFAR, DDPMPP, 55.7),
        ("adm", IMAGENET64, {}, 295.9),
        ("edm2", LATENT, {"model_channels": 128}, 124.7),
        ("edm2", LATENT, {"model_channels": 192}, 280.2),
        ("edm2", LATENT, {"model_channels": 448}, 1523.2),
    ],
)
def test_published_sizes(
    kind: str, images: tuple[int, int, int], arguments: dict[str, object], millions: float
) -> None:
    with torch.device("meta"):
        network = new_network(kind, *images, **arguments)
    assert (network.img_resolution, network.img_channels, network.label_dim) == images
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
