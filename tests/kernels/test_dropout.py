import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edmdistill.draws import Draws
from edmdistill.kernels.dropout import dropout
from edmdistill.kernels.dual import Dual


def keys(rows: int = 16) -> Tensor:
    return Draws(5, rows).dropout()


@pytest.mark.parametrize("p", [0.1, 0.45, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_share_is_dropped_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    y = dropout(torch.ones(16, 5, 33, 31, dtype=dtype), p, keys(), 1)
    assert y.dtype == dtype
    dropped, n = (y == 0).double(), y.numel()
    assert abs(dropped.mean() - p) < 2**-17 + 5 * math.sqrt(p * (1 - p) / n)
    rounded = round(p * 2**16) / 2**16
    assert y.max().item() == pytest.approx(1 / (1 - rounded), rel=torch.finfo(dtype).eps)
    assert set(y.unique().tolist()) == {0, y.max().item()}


def test_no_keys_or_no_share_is_no_dropout() -> None:
    x = torch.ones(2, 3)
    assert dropout(x, 0.5, None, 1) is x
    assert dropout(x, 0.0, keys(2), 1) is x
    assert dropout(x, 2**-18, keys(2), 1) is x
    for all_of_them in (1.0, 1 - 2**-18):
        assert not dropout(x, all_of_them, keys(2), 1).any()


def test_the_least_share_is_dropped_as_often_as_it_says() -> None:
    y = dropout(torch.ones(64, 2**16), 2**-16, keys(64), 1)
    assert abs(int((y == 0).sum()) - 64) < 5 * math.sqrt(64)


def test_masks_belong_to_rows_layers_and_passes() -> None:
    draws = Draws(5, 16)
    passes = draws.dropout(), draws.dropout()
    x = torch.ones(16, 8, 16, 16)
    masks = torch.stack([dropout(x, 0.5, key, layer) for key in passes for layer in (1, 2, 40)]).flatten(2) - 1
    alike = masks.flatten(0, 1)
    correlation = (alike @ alike.T) / alike.shape[1] - torch.eye(len(alike))
    assert correlation.abs().max() < 5 / math.sqrt(alike.shape[1])
    assert torch.equal(dropout(x[3:5], 0.5, passes[0][3:5], 2), dropout(x, 0.5, passes[0], 2)[3:5])


def test_value_and_tangent_have_one_mask() -> None:
    x, dx = torch.randn(2, 4, 3, 5, 5)
    y = dropout(Dual(x, dx), 0.3, keys(4), 1)
    assert torch.equal(y.value, dropout(x, 0.3, keys(4), 1))
    assert torch.equal(y.tangent, dropout(dx, 0.3, keys(4), 1))


def test_gradients_and_recomputation() -> None:
    x = torch.ones(4, 3, 5, 5, requires_grad=True)

    def function(x: Tensor, keys: Tensor) -> Tensor:
        return dropout(x, 0.3, keys, 1) ** 2

    plain = torch.autograd.grad(function(x, keys(4)).sum(), x)[0]
    again = torch.autograd.grad(checkpoint(function, x, keys(4), use_reentrant=False).sum(), x)[0]
    assert torch.equal(plain, again)
    assert torch.equal(plain != 0, dropout(x, 0.3, keys(4), 1) != 0)


def test_it_compiles_without_a_break() -> None:
    x = torch.randn(4, 3, 5, 5)
    compiled = torch.compile(dropout, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, 0.3, keys(4), 2), dropout(x, 0.3, keys(4), 2))


def test_the_meta_device_has_shapes() -> None:
    assert dropout(torch.empty(4, 3, 5, 5, device="meta"), 0.3, keys(4).to("meta"), 1).shape == (4, 3, 5, 5)
