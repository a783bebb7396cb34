"""A loss in pieces is the same loss, with the same gradient, and holds less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_rounded
from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods import METHODS
from edmdistill.methods.base import Batch, Loss, Method, NoiseRange
from edmdistill.methods.cosim import CoSIM
from edmdistill.methods.ladd import LADD
from edmdistill.methods.pieces import Pieces
from edmdistill.methods.sid import SiD
from edmdistill.methods.sida import SiDA

ROWS = 7


@pytest.mark.parametrize("count", [2, ROWS])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (CoSIM, {}),
        (CoSIM, {"gradient": "kl"}),
        (CoSIM, {"order": "t", "anchor_sigma": 1.0, "weight": "c_out"}),
        (CoSIM, {"gan": 1.0, "gan_channels": 8, "balance": "adaptive"}),
        (SiD, {}),
        (SiDA, {}),
        (LADD, {}),
    ],
    ids=str,
)
def test_value_and_gradient_are_those_of_the_whole(
    tiny_networks: Callable[..., Any],
    tiny_batch: Callable[..., Batch],
    noise: NoiseRange,
    method: type[Method[Any]],
    options: dict[str, Any],
    count: int,
) -> None:
    networks, batch = tiny_networks(method, **options), tiny_batch(ROWS)
    for role, network in networks.items():
        network.requires_grad_(role == "generator")
    made = method(method.Config(**options), networks, noise)
    turn = made.turns()[-1]
    found = []
    for pieces in (Pieces(), Pieces(count, scale=3.0)):
        made.pieces = pieces
        loss = turn.whole(batch, Draws(3, ROWS))
        loss.value.mul(torch.arange(1.0, ROWS + 1)).sum().backward()
        gradients = [parameter.grad.clone() for parameter in networks["generator"].parameters()]
        networks["generator"].zero_grad()
        found.append((loss, gradients))
    (whole, expected), (split, gradients) = found
    torch.testing.assert_close(split.signals, whole.signals)
    assert torch.equal(split.t, whole.t)
    assert torch.equal(split.generated, whole.generated)
    for a, b in zip([split.value, *gradients], [whole.value, *expected], strict=True):
        assert b.abs().max() > 0
        assert_rounded(a, b, 10_000)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_splits_its_loss_says_so(
    name: str, tiny_networks: Callable[..., Any], tiny_batch: Callable[..., Batch], noise: NoiseRange
) -> None:
    kind = METHODS[name].load()
    options = {"gan_channels": 8} if name == "ctm" else {}
    networks, split = tiny_networks(kind, **options), []

    class Counted(kind):  # type: ignore[misc, valid-type]
        @staticmethod
        def pieces(loss: Callable[..., Loss], *inputs: Tensor) -> Loss:
            split.append(loss)
            return loss(*inputs)

    turn = Counted(kind.Config(**options), networks, noise).turns()[-1]
    turn.whole(tiny_batch(12), Draws(0, 12))
    assert bool(split) == kind.splits_loss


def test_gradients_in_half_precision_are_scaled_inside() -> None:
    x = torch.ones(4, 3, requires_grad=True)

    def loss(x: Tensor) -> Loss:
        return Loss((x.half().float() * 1e-9).sum(1), x.detach()[:, 0], {"mean": x.detach().mean()})

    Pieces(2)(loss, x).value.sum().backward()
    assert not x.grad.any()
    x.grad = None
    found = Pieces(2, scale=2.0**20)(loss, x)
    found.value.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e-9), rtol=1e-3, atol=0)
    assert found.signals["mean"] == 1


def test_without_gradients_it_is_the_loss_itself() -> None:
    x, seen = torch.ones(4, 3, requires_grad=True), []
    with torch.no_grad():
        found = Pieces(2)(lambda x: (seen.append(x), Loss(x.sum(1), x[:, 0]))[1], x)
    assert found.value.tolist() == [3.0] * 4
    assert [part is x for part in seen] == [True]


def test_rows_without_a_gradient_and_a_gradient_that_overflows() -> None:
    """The value stays finite, so that the step is skipped and the scale shrinks."""
    x, y = torch.ones(4, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    found = Pieces(3, scale=1e38)(lambda x, y: Loss((x * 1e5).sum(1), x[:, 0].detach()), x, y)
    assert found.value.isfinite().all()
    found.value.sum().backward()
    assert x.grad.isinf().all()
    assert not y.grad.any()
