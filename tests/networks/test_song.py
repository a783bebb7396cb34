"""NCSN++'s skip connections of images, of which no official network that ships is made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edmdistill.kernels.resampling import downsample, separable, upsample
from edmdistill.networks.base import Conditioning
from edmdistill.networks.flow import FlowNetwork

TAPS = [1, 3, 3, 1]


@torch.no_grad()
def test_skips_carry_the_image_down_and_sum_images_up(make_flow: Callable[..., FlowNetwork]) -> None:
    network: Any = make_flow("song-skip", resample_filter=TAPS).network
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in [*network.enc.named_children(), *network.dec.named_children()]:
        part = "dec." if layer in network.dec.values() else "enc."
        layer.register_forward_hook(lambda layer, x, y, name=part + name: calls.update({name: (x[0], y)}))
    x = torch.randn(2, 3, 8, 8)
    F = network(x, Conditioning(torch.tensor([-1.0, 0.3])))

    image, small = calls["enc.4x4_aux_down"]
    assert torch.equal(image, x)
    torch.testing.assert_close(small, downsample(x, separable(TAPS)))
    assert torch.equal(calls["enc.4x4_aux_skip"][0], small)
    entered = calls["enc.4x4_down"][1] + calls["enc.4x4_aux_skip"][1]
    assert torch.equal(calls["enc.4x4_block0"][0], entered)
    assert torch.equal(calls["dec.4x4_block1"][0][:, -entered.shape[1] :], entered)

    assert torch.equal(calls["dec.4x4_aux_norm"][0], calls["dec.4x4_block1"][1])
    small, large = calls["dec.8x8_aux_up"]
    assert torch.equal(small, calls["dec.4x4_aux_conv"][1])
    torch.testing.assert_close(large, upsample(small, separable(TAPS)))
    assert torch.equal(F, calls["dec.8x8_aux_conv"][1] + large)
    assert network.last_layer is network.dec["8x8_aux_conv"]
