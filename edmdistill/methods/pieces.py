"""A loss over generated images, in pieces: the networks inside it hold the activations of one piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from edmdistill.methods.base import Loss


class Pieces(NamedTuple):
    """How a loss is computed whose rows depend on the same rows of its inputs alone.

    In one piece, autograd holds the activations of all networks, from the generator to the loss, at one time. In
    several, the graph is cut at the inputs: each piece is differentiated as soon as its loss is known, and what is left
    of it is the gradient of its inputs. Value and gradient are the same up to rounding, and nothing is computed twice.

    Attributes:
        number: of pieces, of equally many rows as far as possible.
        scale: factor of the loss while it is differentiated, so that gradients do not underflow in fp16.
    """

    number: int = 1
    scale: float = 1.0

    def __call__(self, loss: Callable[..., Loss], *inputs: Tensor | None) -> Loss:
        """Returns loss(*inputs).

        Args:
            loss: of inputs to a Loss without images.  Its networks are frozen.
            inputs: [B,...] each.
        """
        if self.number == 1 or not torch.is_grad_enabled():
            return loss(*inputs)
        rows = next(len(x) for x in inputs if x is not None)
        learned = [x for x in inputs if x is not None and x.requires_grad]
        gradients = [torch.zeros_like(x) for x in learned]
        parts = []
        for start, stop in pairwise(rows * piece // self.number for piece in range(self.number + 1)):
            part = [None if x is None else x[start:stop].detach().requires_grad_(x.requires_grad) for x in inputs]
            one = loss(*part)
            leaves = [x for x in part if x is not None and x.requires_grad]
            slopes = torch.autograd.grad(one.value.sum() * self.scale, leaves, allow_unused=True)
            for gradient, slope in zip(gradients, slopes, strict=True):
                if slope is not None:
                    gradient[start:stop] = slope / self.scale
            parts.append(one._replace(value=one.value.detach()))
        sizes = [len(part.value) / rows for part in parts]
        values = torch.cat([part.value for part in parts])
        return parts[0]._replace(
            value=_Differentiated.apply(values, gradients, *learned),  # type: ignore[no-untyped-call, unused-ignore]
            t=torch.cat([part.t for part in parts]),
            signals={
                name: torch.stack([size * part.signals[name] for size, part in zip(sizes, parts, strict=True)]).sum(0)
                for name in parts[0].signals
            },
        )


class _Differentiated(torch.autograd.Function):
    """Values [B] whose gradients in the inputs are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor | None, ...]:
        (slope,) = slopes
        return None, None, *(gradient * slope.view(-1, *[1] * (gradient.ndim - 1)) for gradient in ctx.gradients)
