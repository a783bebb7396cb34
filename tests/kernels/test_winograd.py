"""Winograd's convolution: the same function as torch's, its rounding errors, and where it is chosen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as f
from tolerance import rounding
from torch import Tensor, nn
from torch.autograd import forward_ad

from edmdistill.kernels import winograd
from edmdistill.kernels.dual import Dual
from edmdistill.kernels.linear import conv2d
from edmdistill.kernels.winograd import FrozenWeight, pays, transform_weight, transforms, winograd_conv2d


@pytest.fixture
def one_thread(set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor without AMX."""
    set_threads(1)
    monkeypatch.setattr(winograd, "least_channels", lambda: 64)


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (20, 2, 8, 8), (2, 3, 64, 48), (1, 2, 8, 280), (3, 2, 4, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_convolution(shape: tuple[int, ...], biased: bool) -> None:
    x, weight = images(*shape, dtype=torch.float64), images(5, shape[1], 3, 3, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64) if biased else None
    y = winograd_conv2d(x, transform_weight(weight), bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, f.conv2d(x, weight, bias, padding=1), rtol=1e-11, atol=1e-12)


def test_it_is_linear_in_images_and_weights() -> None:
    x, y = images(2, 3, 8, 8, dtype=torch.float64), images(2, 3, 8, 8, dtype=torch.float64)
    v, w = (transform_weight(torch.randn(4, 3, 3, 3, dtype=torch.float64)) for _ in range(2))
    found = winograd_conv2d(2 * x - y, v + 3 * w)
    parts = [a * winograd_conv2d(image, weight) for a, image, weight in ((2, x, v), (-1, y, v), (6, x, w), (-3, y, w))]
    torch.testing.assert_close(found, sum(parts), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("channels", [64, 160])  # with 8 it would be 4 times the usual
def test_rounding_errors(channels: int) -> None:
    """Each number within the bound of its own products, all of them by their absolute values; the rms far within."""
    x, weight = images(2, channels, 16, 16), images(6, channels, 3, 3)
    found, plain = winograd_conv2d(x, transform_weight(weight)), f.conv2d(x, weight, padding=1)
    exact = f.conv2d(x.double(), weight.double(), padding=1)
    AT, BT, G = (matrix.abs() for matrix in transforms())
    tiles = f.unfold(x.double().abs(), 6, padding=1, stride=4).view(2, channels, 36, 16)
    U = G @ weight.double().abs().view(6, channels, 9, 1)
    sums = AT @ torch.einsum("mck,bckt->bmkt", U[..., 0], BT @ tiles)
    size = f.fold(sums.reshape(2, 6 * 16, 16), (16, 16), 4, stride=4)
    assert ((found - exact).abs() <= rounding(torch.float32, 9 + 36 + channels + 36) * size).all()
    rms, usual = (float((y - exact).square().mean().sqrt()) for y in (found, plain))
    assert rms <= 4 * usual


CHANGES: dict[str, dict[str, Any]] = {
    "it is as it should be": {},
    "few images": {"shape": (1, 128, 8, 8)},
    "small images": {"shape": (4, 64, 8, 8)},
    "height": {"shape": (4, 64, 18, 16)},
    "width": {"shape": (4, 64, 16, 18)},
    "channels": {"shape": (4, 63, 16, 16)},
    "channels out": {"out": 63},
    "large weight": {"shape": (4, 1024, 16, 16), "out": 512},
    "layout": {"layout": torch.contiguous_format},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "weight in bfloat16": {"weight": torch.bfloat16},
    "meta device": {"device": "meta"},
    "gradients": {"grad": True},
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("why", CHANGES)
def test_where_it_is_chosen(why: str) -> None:
    change: dict[str, Any] = {"shape": (1, 64, 16, 16), "out": 64, "layout": torch.channels_last, "grad": False}
    change |= {"dtype": torch.float32, "weight": torch.float32, "device": "cpu"} | CHANGES[why]
    x = torch.ones(change["shape"], dtype=change["dtype"], device=change["device"])
    weight = torch.ones(change["out"], x.shape[1], 3, 3, dtype=change["weight"], device=change["device"])
    with torch.set_grad_enabled(change["grad"]):
        assert pays(x.contiguous(memory_format=change["layout"]), weight) == (not CHANGES[why])
    for shape in ((4, 128, 8, 8), (1, 64, 32, 32), (1, 64, 64, 4)):
        with torch.no_grad():
            assert pays(images(*shape), torch.ones(128, shape[1], 3, 3))


@torch.no_grad()
@pytest.mark.parametrize(("capabilities", "least"), [({"amx_tile": True}, 192), ({"amx_tile": False}, 64), ({}, 64)])
def test_with_amx_it_takes_more_channels(
    capabilities: dict[str, bool], least: int, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_threads(1)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(winograd, "least_channels", winograd.least_channels.__wrapped__)
    for channels in (least, least - 1):
        x, weight = images(1, channels, 16, 16), torch.ones(least, channels, 3, 3)
        assert pays(x, weight) == (channels == least)


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
def test_it_is_not_chosen_for_tangents_compiled_code_and_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = images(1, 64, 16, 16), torch.ones(64, 64, 3, 3)
    assert pays(x, weight)
    dual: Any = Dual(x, x)
    assert not pays(dual, weight)
    with forward_ad.dual_level():  # as within torch.func.jvp
        assert not pays(x, weight)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not pays(x, weight)
    torch.set_num_threads(2)
    assert not pays(x, weight)


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
def test_transforms_follow_their_weight() -> None:
    x, bias = images(1, 64, 16, 16), torch.randn(64)
    weight = nn.Parameter(torch.randn(64, 64, 3, 3))
    frozen = FrozenWeight(weight)

    def close() -> bool:
        found, plain = conv2d(x, weight, bias, frozen), conv2d(x, weight, bias)
        assert not torch.equal(found, plain)  # it was chosen
        return torch.allclose(found, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))

    assert close()
    assert frozen.transformed is frozen.transformed
    weight.mul_(2)
    assert close()
    weight.data = torch.randn(64, 64, 3, 3)
    assert close()
    other = torch.randn(64, 64, 3, 3)
    assert torch.equal(conv2d(x, other, bias, frozen), conv2d(x, other, bias))


def test_a_transform_has_no_gradient_and_may_be_of_an_inference_tensor() -> None:
    parameter = nn.Parameter(torch.randn(2, 3, 3, 3))
    assert not FrozenWeight(parameter).transformed.requires_grad
    with torch.inference_mode():
        weight = parameter.clone()
    torch.testing.assert_close(FrozenWeight(weight).transformed, FrozenWeight(parameter).transformed)


@torch.no_grad()
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", [6, 17, 22])
def test_other_sizes_are_convolved_as_ever(size: int) -> None:
    x, weight = images(16, 64, size, size), images(64, 64, 3, 3)
    assert torch.equal(conv2d(x, weight, None, FrozenWeight(weight)), conv2d(x, weight))
