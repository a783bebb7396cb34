"""What the meta device remembers is what it derives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edmdistill.training.meta import CachedShapes

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
