"""What the meta device remembers is what it derives."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edmdistill.methods import METHODS
from edmdistill.methods.base import NoiseRange
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.recipes.library import load_recipe
from edmdistill.training import probe
from edmdistill.training.meta import CachedShapes, cached_passes
from edmdistill.training.probe import Probe
from edmdistill.training.roles import build_roles

SETS = {"ctm": ["method.max_steps=2", "method.gan=1.0", "method.gan_channels=32"]}
"""CTM's solver takes two steps, and its discriminator looks at features."""
X = torch.empty(2, 4, 8, 6, device="meta")
COUNTS = torch.empty(3, dtype=torch.int64, device="meta")
CALLS: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
    "convolution": lambda: functional.conv2d(X, torch.empty(5, 4, 3, 3, device="meta"), padding=1),
    "channels last": lambda: X.to(memory_format=torch.channels_last) * 2,
    "transposed": lambda: X.transpose(1, 3) + 1,
    "view": lambda: X.transpose(1, 3),
    "integers": lambda: COUNTS * 1,
    "floats": lambda: COUNTS * 1.0,
    "flags": lambda: COUNTS * True,
    "statistics": lambda: torch.var_mean(X, (1, 2)),
    "parts": lambda: X.split(3, 1),
    "concatenated": lambda: torch.cat([X, X.half()], 1),
    "half": lambda: X.to(torch.float16),
    "in place": lambda: X.clone().mul_(2),
    "host": lambda: torch.arange(3) * 2,
}


def described(out: Tensor | tuple[Tensor, ...]) -> list[tuple[object, ...]]:
    return [
        (type(out), leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device)
        for leaf in ((out,) if isinstance(out, Tensor) else out)
    ]


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_returns_what_torch_does(name: str) -> None:
    expected = described(CALLS[name]())
    with CachedShapes():
        first, second = CALLS[name](), CALLS[name]()
    assert described(first) == described(second) == expected
    if name == "host":
        assert second.tolist() == [0, 2, 4]


def test_a_view_that_torch_does_not_call_one_takes_no_memory_again() -> None:
    """Autograd reshapes gradients by it."""
    with CachedShapes():
        for _ in range(2):
            fresh = X.clone()
            view = torch.ops.aten._unsafe_view(fresh, (2, 24, 8))
            assert view.untyped_storage()._cdata == fresh.untyped_storage()._cdata


def test_what_names_no_dtype_has_the_default() -> None:
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        with CachedShapes():
            assert torch.empty(2, device="meta").dtype == dtype


def test_gradients_have_the_shapes_of_their_weights() -> None:
    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to("meta")
    for _ in range(2):
        with CachedShapes():
            layers(X).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.is_meta for p in layers.parameters())


class Counted(nn.Linear):
    """A network that counts its passes; two outputs."""

    passes = 0

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.passes += 1
        return super().forward(x), x.half()


def test_a_pass_without_gradient_that_was_made_before_is_not_made_again() -> None:
    network = Counted(6, 6).to("meta")
    with cached_passes([network]):
        with torch.no_grad():
            passes = [network(X), network(X), network(X, scale=COUNTS), network(X[:1]), network(X[:1])]
        assert network.passes == 3  # of other shapes, and of other arguments
        for x, out in zip((X, X, X, X[:1], X[:1]), passes, strict=True):
            assert described(out) == described((x @ network.weight, x.half()))
        network(X)[0].sum().backward()
        assert (network.passes, network.weight.grad is not None) == (4, True)
    with torch.no_grad():
        network(X)
    assert network.passes == 5


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_outputs_come_back_as_the_network_gives_them(kind: type) -> None:
    """A discriminator's features are a list."""

    class Features(nn.Module):
        def forward(self, x: Tensor) -> object:
            return kind([x * 2, x[:, :1] + 1])

    network = Features()
    expected = described(network(X))
    with cached_passes([network]), torch.no_grad():
        found = network(X), network(X)
    assert all(isinstance(out, kind) and described(out) == expected for out in found)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_reaches_the_same_parameters(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether passes without gradient are made anew or not."""
    recipe = load_recipe(f"{method}/digits", sets=SETS.get(method, ()))
    network = UNet(8, 1, 10, 8, [1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    networks = build_roles(recipe, FlowNetwork(network, EDM()))
    unused = []
    for cached in (probe.cached_passes, lambda networks: nullcontext()):
        monkeypatch.setattr(probe, "cached_passes", cached)
        noise = NoiseRange(0.5, 0.002, 80.0)
        unused.append(Probe(recipe.method_class, recipe.method, networks, noise).unused())
    assert unused[0] == unused[1]


def test_a_probe_follows_a_long_trajectory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = UNet(8, 1, 10, 8, [1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    passes, unused, forward = list[int](), [], FlowNetwork.forward
    monkeypatch.setattr(FlowNetwork, "forward", lambda self, *a, **more: passes.append(1) or forward(self, *a, **more))
    for steps in (4, 40):
        passes.append(0)
        recipe = load_recipe("fmd/digits", sets=[f"method.trajectory_steps={steps}"])
        networks = build_roles(recipe, FlowNetwork(network, EDM()))
        noise = NoiseRange(0.5, 0.002, 80.0)
        unused.append(Probe(recipe.method_class, recipe.method, networks, noise).unused())
    assert unused[0] == unused[1]
    first, second = "".join(map(str, passes)).strip("0").split("0")
    assert len(first) == len(second) < 10
