"""EDM2's layers: convolutions with weights normalized in every forward pass, and random Fourier features.

Parameter and buffer names are the official ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edmdistill.kernels.magnitude import mp_conv, mp_fourier, mp_scale, mp_weight
from edmdistill.kernels.resampling import upsampled_conv2d
from edmdistill.kernels.winograd import FrozenWeight
from edmdistill.networks.initial import normal

GAIN_LAYERS = {"emb_gain": "emb_linear", "out_gain": "out_conv"}
"""EDM2's gains, and the layer that each scales."""


class MPConv(nn.Module):
    """Magnitude-preserving convolution (kernel 1, 3, ...) or linear map (None).  Source: EDM2, eq. 47, 66.

    Attributes:
        factor: a constant by which the result is multiplied; it stands for those of the neighboring operations.
        effective: the weight to compute with, and the parameter that it was made of; see EffectiveWeights.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int | None = None, factor: float = 1.0) -> None:
        super().__init__()
        size = () if kernel is None else (kernel, kernel)
        self.weight = nn.Parameter(normal(out_channels, in_channels, *size))
        self.factor = factor
        self.folded = False
        self.effective: tuple[Tensor | None, Tensor | None] = (None, None)
        self.frozen: FrozenWeight | None = None

    def forward(self, x: Tensor, gain: Tensor | float = 1.0, upsampled: bool = False) -> Tensor:
        """Returns the linear map or convolution of x; upsampled: the convolution of x at twice its resolution."""
        weight, source = self.effective
        if self.folded:
            weight = self.weight
        elif weight is None or source is not self.weight:  # another one is put in its place by functional_call
            weight = mp_weight(self.weight, gain, self.factor)
        return upsampled_conv2d(x, weight) if upsampled else mp_conv(x, weight, self.frozen)

    @torch.no_grad()
    def fold_(self, gain: Tensor | float = 1.0) -> None:
        """Folds normalization, gain and factor into the weight: the layer becomes a plain convolution or linear map.

        The output does not change but for rounding; a gain passed later has no effect.
        """
        if not self.folded:
            self.weight.mul_(mp_scale(self.weight, gain, self.factor))  # in place: a second copy costs more
        self.weight.requires_grad_(False)
        self.folded = True


def gained_layers(network: nn.Module) -> Iterator[tuple[MPConv, nn.Parameter | None]]:
    """Yields each magnitude-preserving layer of a network, with its gain if it has one."""
    gains = {
        getattr(module, layer): getattr(module, gain)
        for module in network.modules()
        for gain, layer in GAIN_LAYERS.items()
        if isinstance(getattr(module, layer, None), MPConv)
    }
    yield from ((layer, gains.get(layer)) for layer in network.modules() if isinstance(layer, MPConv))


@torch.no_grad()
def scale_results(network: nn.Module) -> None:
    """Makes magnitude-preserving layers scale their results, not their weights: those stay mapped from a file.

    `fold_` would copy them. For inference in float32 on small images, where scaling the results takes less time.
    """
    for layer, gain in gained_layers(network):
        scale = mp_scale(layer.weight, 1.0 if gain is None else gain, layer.factor)[:, 0]
        layer.register_forward_hook(lambda layer, inputs, result, scale=scale: result * scale)
        layer.folded = True


class EffectiveWeights:
    """The weights that a network's magnitude-preserving layers compute with, made once for several passes.

    Within `shared`, passes use them. At its end their gradient, summed over all passes, goes on to the parameters: the
    derivative of the normalization is linear in it, so the result is that of passes which normalize for themselves.

    Args:
        network: on its device, neither sharded nor folded.
        dtype: of its activations, to which constant weights of convolutions are cast; None: they are not.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None) -> None:
        pairs = list(gained_layers(network))
        self.layers = [layer for layer, _ in pairs]
        self.gains = [gain for _, gain in pairs if gain is not None]
        self.dtype = dtype
        # For each output of each layer: 1/sqrt(fan-in), the constant factor, and the number of its gain, 0 for none.
        numbers = iter(range(1, len(pairs) + 1))
        table = [
            (layer.weight[0].numel() ** -0.5, layer.factor, 0 if gain is None else next(numbers))
            for layer, gain in pairs
        ]
        sizes, like = torch.tensor([len(layer.weight) for layer in self.layers]), self.layers[0].weight
        columns = torch.tensor(table, dtype=torch.float64).repeat_interleave(sizes, 0).unbind(1)
        self.root, self.factor = columns[0].to(like), (columns[0] * columns[1]).to(like)
        self.which = columns[2].to(like.device, torch.int64)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """A context in which passes share weights.  Gradients reach the parameters if it ends without an error."""
        with torch.no_grad():
            weights = self.weights
            norm = torch.cat([torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim))) for w in weights])
            inverse = 1 / (norm * self.root + 1e-4)
            gain = self.factor * torch.stack([norm.new_ones([]), *self.gains])[self.which]
            effective = list(torch._foreach_mul(weights, self.by_layer(gain * inverse)))
        for index, (layer, weight) in enumerate(zip(self.layers, effective, strict=True)):
            constant = not layer.weight.requires_grad
            weight = weight.to(self.dtype) if constant and weight.ndim == 4 else weight.requires_grad_(not constant)
            layer.effective = weight, layer.weight
            effective[index] = weight  # and the wide one goes
        try:
            yield
            slopes = [weight.grad for weight in effective]
            if any(slope is not None for slope in slopes):
                self.backward(slopes, norm, inverse, gain)
        finally:
            for layer in self.layers:
                layer.effective = None, None

    @torch.no_grad()
    def backward(self, slopes: Sequence[Tensor | None], norm: Tensor, inverse: Tensor, gain: Tensor) -> None:
        """Adds the parameters' gradients, given those of W = gain inverse w, inverse = 1 / (root |w| + 1e-4)."""
        weights = self.weights
        known = [torch.zeros_like(w) if slope is None else slope for slope, w in zip(slopes, weights, strict=True)]
        inner = torch.cat(
            [product.sum(tuple(range(1, product.ndim))) for product in torch._foreach_mul(known, weights)]
        )
        radial = -inner * gain * inverse.square() * self.root / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        torch._foreach_mul_(known, self.by_layer(gain * inverse))
        torch._foreach_addcmul_(known, weights, self.by_layer(radial))
        of_gains = inner.new_zeros(len(self.gains) + 1).index_add_(0, self.which, inner * self.factor * inverse)
        everything = zip([*weights, *self.gains], [*known, *of_gains[1:].unbind()], [*slopes, *self.gains], strict=True)
        reached = [(p, gradient) for p, gradient, slope in everything if p.requires_grad and slope is not None]
        # By autograd and not by hand: DDP waits for its hooks.
        torch.autograd.backward([parameter for parameter, _ in reached], [gradient for _, gradient in reached])

    @property
    def weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]

    def by_layer(self, rows: Tensor) -> list[Tensor]:
        """Splits a vector of a number for each output of each layer, as factors of the weights.  -> [M,1,...] each"""
        weights = self.weights
        parts = torch.split(rows, [len(weight) for weight in weights])
        return [part.view(-1, *[1] * (weight.ndim - 1)) for part, weight in zip(parts, weights, strict=True)]


class MPFourier(nn.Module):
    """Random Fourier features of c_noise.  [B] -> [B,channels]  Source: EDM2, eq. 75."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", normal(channels, std=2 * math.pi))
        self.register_buffer("phases", torch.empty(channels).uniform_().mul_(2 * math.pi))

    def forward(self, c_noise: Tensor) -> Tensor:
        return mp_fourier(c_noise, self.freqs, self.phases)
