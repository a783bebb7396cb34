"""Every rule for tangents against torch.func.jvp, and what has none."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as f
from tolerance import assert_rounded
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edmdistill.kernels.dual import RULES, Dual, value
from edmdistill.kernels.group_norm import group_norm

WEIGHT = torch.linspace(-1, 1, 5 * 8 * 9, dtype=torch.float64).reshape(5, 8, 3, 3).sin()
BIAS = torch.linspace(1, 2, 8, dtype=torch.float64)

# By rule, what of x [2,8,4,4] it is tried on, most of them with a constant on either side, or none.
CASES: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "new_zeros": [lambda x: x + x.new_zeros(4)],
    "ones_like": [lambda x: x * torch.ones_like(x)],
    "reshape": [lambda x: x.reshape(4, -1)],
    "flatten": [lambda x: x.flatten(1)],
    "transpose": [lambda x: x.transpose(1, 3)],
    "permute": [lambda x: x.permute(2, 0, 1, 3)],
    "contiguous": [lambda x: x.transpose(1, 3).contiguous()],
    "unbind": [lambda x: x.unbind(1)[3]],
    "chunk": [lambda x: x.chunk(2, dim=1)[1]],
    "to": [lambda x: x.to(torch.float64)],
    "neg": [lambda x: -x[:, :2, None, 1]],
    "avg_pool2d": [lambda x: f.avg_pool2d(x, 2)],
    "interpolate": [lambda x: f.interpolate(x, scale_factor=2, mode="nearest")],
    "linear": [lambda x: f.linear(x, BIAS[None, :4]), lambda x: f.linear(x, BIAS[None, :4], BIAS[:1])],
    "conv2d": [lambda x: f.conv2d(x, WEIGHT, BIAS[:5]), lambda x: f.conv2d(x, WEIGHT[:4, :2], groups=4, padding=1)],
    "conv_transpose2d": [lambda x: f.conv_transpose2d(x, WEIGHT.transpose(0, 1), BIAS[:5], stride=2)],
    "pad": [lambda x: f.pad(x, [1] * 4), lambda x: f.pad(x, [1] * 4, value=3.0)],
    "cat": [
        lambda x: torch.cat([x, torch.ones(2, 1, 4, 4).double(), 2 * x], dim=1),
        lambda x: torch.cat([x, x[:1]]),
        lambda x: torch.cat([x, x[..., :1]], -1),
    ],
    "add": [lambda x: 1 + x + x[:1], lambda x: BIAS[:4] + x, lambda x: x[:1, :, :1] + BIAS[:2, None, None, None]],
    "sub": [lambda x: x[:1] - x - 2, lambda x: BIAS[:4] - x],
    "lerp": [lambda x: x.lerp(-x, 0.3), lambda x: x.lerp(BIAS[:4], 0.3), lambda x: torch.lerp(BIAS[:4], x[:1], 0.3)],
    "mul": [lambda x: x * x[:1] * 3, lambda x: BIAS[:4] * x, lambda x: 2 * x * BIAS[:4]],
    "div": [lambda x: x[:1] / (x + 9), lambda x: x / 3, lambda x: x / BIAS[:4], lambda x: BIAS[:4] / (x + 9)],
    "pow": [lambda x: (x + 9) ** 2, lambda x: x**3],
    "reciprocal": [lambda x: 2 / (x + 9)],
    "sqrt": [lambda x: (x + 9).sqrt()],
    "exp": [torch.exp],
    "log": [lambda x: (x + 9).log()],
    "sin": [torch.sin],
    "cos": [lambda x: x.cos()],
    "tan": [lambda x: (x / 9).tan()],
    "clamp": [lambda x: x.clamp(-0.6, 0.8)],
    "hardtanh": [lambda x: f.hardtanh(x, -0.5, 0.7)],
    "silu": [f.silu],
    "masked_fill": [lambda x: x.masked_fill(torch.arange(4) > 1, 0.0)],
    "native_group_norm": [lambda x: torch.native_group_norm(x, BIAS, BIAS, 2, 8, 16, 2, 1e-2)[0]],
    "linalg_vector_norm": [lambda x: torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64)],
    "scaled_dot_product_attention": [lambda x: f.scaled_dot_product_attention(x, x[:, :, 1:], x[:, :, :3].sin())],
}


@pytest.fixture
def x() -> Dual:
    """Among its values are the bounds of hardtanh."""
    torch.manual_seed(0)
    value, tangent = torch.randn(2, 2, 8, 4, 4, dtype=torch.float64)
    value[0, 0, 0, :2] = torch.tensor([-0.5, 0.7])
    return Dual(value, tangent)


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("name", CASES)
def test_rules_are_torchs_forward_derivative(x: Dual, name: str) -> None:
    for operation in CASES[name]:
        with sdpa_kernel(SDPBackend.MATH):
            _, tangent = torch.func.jvp(operation, (x.value,), (x.tangent,))
        found = operation(x)
        assert torch.equal(found.value, operation(x.value))
        torch.testing.assert_close(found.tangent, tangent, rtol=1e-12, atol=1e-12)


def test_tangents_pass_at_the_bounds_of_clamp() -> None:
    """So times at the ends of their range have tangents.  torch's own derivative is 1 there before 2.15, then 0."""
    t = torch.tensor([-1.0, -0.5, 0.1, 0.7, 1.0])
    assert Dual(t, torch.ones(5)).clamp(-0.5, 0.7).tangent.tolist() == [0, 1, 1, 1, 0]


def gradients(operation: Callable[[Any], Any], x: Any, weight: Tensor) -> Tensor:
    """In x's value and in a weight, through the values of an operation's results."""
    y = value(operation(x * weight[:, None, None]))
    return torch.cat([slope.flatten() for slope in torch.autograd.grad(y.sin().sum(), [weight, value(x)])])


@pytest.mark.parametrize("name", CASES)
def test_values_have_the_gradient_that_they_have_without_tangents(x: Dual, name: str) -> None:
    x.value.requires_grad_()
    weight = BIAS.clone().requires_grad_()
    for operation in CASES[name]:
        assert_rounded(gradients(operation, x, weight), gradients(operation, x.value, weight), 100)


def test_a_tangent_is_never_recorded(x: Dual, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = WEIGHT[:4, :2].clone().requires_grad_()

    def convolved() -> Dual:
        found: Dual = f.conv2d(x, weight, groups=4, padding=1)
        return found

    assert (convolved().value.requires_grad, convolved().tangent.requires_grad) == (True, False)
    with torch.no_grad():
        assert not convolved().value.requires_grad
    monkeypatch.setattr(torch, "no_grad", nullcontext)
    with pytest.raises(ValueError, match="a tangent cannot have a gradient"):
        convolved()


def test_torch_finds_both_tensors_in_nested_arguments(x: Dual) -> None:
    """FSDP2 replaces those with a gradient, to act when it arrives."""
    tensors, spec = torch.utils._pytree.tree_flatten({"condition": (x, 3)})
    assert tensors == [x.value, x.tangent, 3]
    (again, _) = torch.utils._pytree.tree_unflatten(tensors, spec)["condition"]
    assert (again.value, again.tangent) == (x.value, x.tangent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["group_norm", "scaled_dot_product_attention", "silu"])
def test_half_precision_rounds_and_no_more(x: Dual, name: str, dtype: torch.dtype) -> None:
    """Statistics are float32, so a group's mean may be far from 0."""
    offset = 30 if name == "group_norm" else 0
    half = Dual((x.value + offset).to(dtype), (x.value + x.tangent).to(dtype))
    operation = {
        "group_norm": lambda x: group_norm(x, torch.ones(8), torch.ones(8), 2, 1e-5),
        "scaled_dot_product_attention": lambda x: f.scaled_dot_product_attention(x, x, x),
        "silu": f.silu,
    }[name]
    found, truth = operation(half), operation(half.to(torch.float64))
    assert found.tangent.dtype == found.value.dtype == dtype
    error = (found.tangent.double() - truth.tangent).norm() / truth.tangent.norm()
    assert error <= torch.finfo(dtype).eps


def test_a_norm_at_zero_stands_still() -> None:
    zero = Dual(torch.zeros(2, 3), torch.ones(2, 3))
    assert not torch.linalg.vector_norm(zero, dim=1, keepdim=True, dtype=torch.float32).tangent.any()


def test_a_norm_of_half_precision_is_a_sum_in_float32() -> None:
    """Products of a thousand are above float16's largest number. Along x, the norm grows as itself."""
    x = torch.full((2, 64), 1000.0, dtype=torch.float16)
    norm = torch.linalg.vector_norm(Dual(x, x), dim=1, keepdim=True, dtype=torch.float32)
    torch.testing.assert_close(norm.tangent, norm.value)
    torch.testing.assert_close(norm.value, torch.full((2, 1), 8000.0))


@pytest.mark.parametrize(
    "operation",
    [
        torch.abs,
        lambda x: x.abs(),
        lambda x: x.sum(),
        lambda x: 1 - x,
        lambda x: x.value == x,
        lambda x: x > 0,
        lambda x: f.conv2d(x.value, x),
        lambda x: f.conv2d(x, x),
        lambda x: f.scaled_dot_product_attention(x, x.value, x),
        lambda x: f.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: f.pad(x, [1, 1], mode="circular", value=1.0),
        lambda x: x.value.add_(x),
        lambda x: x.value.clamp(x, x),
        math.sin,
    ],
)
def test_what_has_no_rule_raises(x: Dual, operation: Callable[[Dual], object]) -> None:
    with pytest.raises((NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError)):
        operation(x)


def test_the_sentences(x: Dual) -> None:
    with pytest.raises(NotImplementedError, match="sigmoid has no rule for tangents"):
        torch.sigmoid(x)
    with pytest.raises(ValueError, match=r"a value \[2, 8, 4, 4\] cannot have a tangent \[2, 8, 4\]"):
        Dual(x.value, x.tangent[..., 0])
    with pytest.raises(ValueError, match="use one or the other"):
        torch.func.jvp(lambda v: Dual(v, v).value, (x.value,), (x.tangent,))
