"""Tangents: a network that is called on Duals gives F and its derivative along a direction, in one pass.

A Dual (value, tangent) goes wherever a tensor goes: torch's functions find their rules here. So what is written for
tensors, down to a whole network and its way from time to noise condition, is read a second time without a word in it
changed. Constants (weights, labels, dropout masks) stay tensors: a layer takes two convolutions, where func.jvp, which
cannot know that the weight is one, takes three.

The value is computed by the very calls that a tensor goes through, so it is what the network gives without tangents.
What has no rule raises; nothing here drops a tangent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = Callable[..., Any]


class Dual:
    """A tensor and its derivative along a direction, of one shape and dtype.

    For tangents that are taken without gradient: what a backward pass through one gives is not promised.

    Raises: ValueError: shapes differ; or torch's own forward derivative is at work, and one of the two would be lost.
    """

    def __init__(self, value: Tensor, tangent: Tensor) -> None:
        if value.shape != tangent.shape:
            raise ValueError(f"a value {list(value.shape)} cannot have a tangent {list(tangent.shape)}")
        if forward_ad._current_level >= 0:
            raise ValueError("a Dual cannot be differentiated by func.jvp or forward_ad: use the one or the other")
        self.value = value
        self.tangent = tangent

    @classmethod
    def __torch_function__(
        cls, function: Function, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(function.__name__)
        if rule is None:
            raise NotImplementedError(f"{function.__name__} has no rule for tangents: write one in kernels/dual.py")
        return rule(function, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """A tensor's method that has a rule."""
        if name not in RULES:
            raise AttributeError(f"{name} has no rule for tangents: write one in kernels/dual.py")
        return partial(RULES[name], getattr(Tensor, name), self)

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    def __getitem__(self, index: Any) -> Any:
        return linear(Tensor.__getitem__, self, index)

    def __neg__(self) -> Any:
        return self.neg()

    def __add__(self, other: Any) -> Any:
        return self.add(other)

    def __sub__(self, other: Any) -> Any:
        return self.sub(other)

    def __mul__(self, other: Any) -> Any:
        return self.mul(other)

    def __truediv__(self, other: Any) -> Any:
        return self.div(other)

    def __rtruediv__(self, other: Any) -> Any:
        return self.reciprocal() * other

    def __pow__(self, exponent: float) -> Any:
        return self.pow(exponent)

    __radd__ = __add__
    __rmul__ = __mul__


def value(x: Any) -> Any:
    """Of a Dual, its value; of a constant, the constant."""
    return x.value if isinstance(x, Dual) else x


def tangent(x: Any) -> Any:
    """Of a Dual, its tangent; of a constant, zeros."""
    return x.tangent if isinstance(x, Dual) else torch.zeros_like(x) if isinstance(x, Tensor) else 0.0


# Rules.  The function, then what it was called with.


def constant(function: Function, x: Dual, *args: Any, **kwargs: Any) -> Any:
    """What looks at shape, dtype and device alone."""
    return function(x.value, *args, **kwargs)


def linear(function: Function, x: Dual, *args: Any, **kwargs: Any) -> Any:
    """f(x), f(dx); where f gives several tensors, as many Duals."""
    y, dy = (function(part, *args, **kwargs) for part in (x.value, x.tangent))
    return Dual(y, dy) if isinstance(y, Tensor) else tuple(map(Dual, y, dy))


def affine(function: Function, x: Dual, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Dual:
    """W x + b, W dx."""
    return Dual(function(x.value, weight, bias, *args, **kwargs), function(x.tangent, weight, None, *args, **kwargs))


def pad(function: Function, x: Dual, width: list[int], **kwargs: Any) -> Dual:
    """Whatever the value is padded with, the tangent is with zeros."""
    return Dual(function(x.value, width, **kwargs), function(x.tangent, width, **kwargs | {"value": None}))


def sum_like(function: Function, a: Any, b: Any, *args: Any) -> Dual:
    """f(a, b), f(da, db), linear in both at once."""
    return Dual(function(value(a), value(b), *args), function(tangent(a), tangent(b), *args))


def cat(function: Function, tensors: Sequence[Any], dim: int = 0) -> Dual:
    return Dual(function([value(x) for x in tensors], dim), function([tangent(x) for x in tensors], dim))


def mul(function: Function, a: Any, b: Any) -> Dual:
    if isinstance(a, Dual) and isinstance(b, Dual):
        return Dual(function(a.value, b.value), a.tangent * b.value + a.value * b.tangent)
    return Dual(function(value(a), value(b)), a.tangent * b if isinstance(a, Dual) else a * b.tangent)


def div(function: Function, a: Any, b: Any) -> Dual:
    """a / b, (da - (a / b) db) / b."""
    if not isinstance(b, Dual):
        return Dual(function(a.value, b), a.tangent / b)
    y = function(value(a), b.value)
    return Dual(y, (tangent(a) - y * b.tangent) / b.value)


def pointwise(slope: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """The rule of y = f(x) with slope(x, y) = f'(x)."""

    def rule(function: Function, x: Dual) -> Dual:
        y = function(x.value)
        return Dual(y, slope(x.value, y) * x.tangent)

    return rule


def power(function: Function, x: Dual, exponent: float) -> Dual:
    return Dual(function(x.value, exponent), exponent * x.value ** (exponent - 1) * x.tangent)


def clamp(function: Function, x: Dual, low: float, high: float) -> Dual:
    return Dual(function(x.value, low, high), x.tangent * ((x.value >= low) & (x.value <= high)))


def silu(function: Function, x: Dual, inplace: bool = False) -> Dual:
    """A diagonal Jacobian is its own transpose, so torch's backward kernel is the forward derivative."""
    return Dual(function(x.value), torch.ops.aten.silu_backward(x.tangent, x.value))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_norm(function: Function, x: Dual, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Dual:
    """y = n w + b, n = (x - mean) / std;  dy = w (dx - mean(dx) - n mean(n dx)) / std, in float32 or better."""
    (B, C), size = x.shape[:2], x.shape[2:].numel()
    wide, dwide = (part.to(at_least_float32(x.dtype)) for part in (x.value, x.tangent))
    variance, mean = torch.var_mean(wide.reshape(B, groups, -1), -1, correction=0)
    rstd = (variance + eps).rsqrt()
    mask = [True, False, False]
    dn = torch.ops.aten.native_group_norm_backward(dwide, wide, mean, rstd, None, B, C, size, groups, mask)[0]
    return Dual(function(x.value, groups, weight, bias, eps), dn.to(x.dtype) * weight[:, None, None])


def vector_norm(function: Function, x: Dual, *, dim: Any, keepdim: bool, dtype: torch.dtype) -> Dual:
    """|x|, <x, dx> / |x|; at 0, which has no derivative, 0."""
    norm = function(x.value, dim=dim, keepdim=keepdim, dtype=dtype)
    inner = (x.value.to(dtype) * x.tangent.to(dtype)).sum(dim, keepdim)
    return Dual(norm, inner / norm.clamp(min=torch.finfo(dtype).tiny))


def attention(function: Function, q: Dual, k: Dual, v: Dual) -> Dual:
    """y = P v, P = softmax(S), S = q k^T / sqrt(D);  dy = P (dS - sum(P dS)) v + P dv, P and dS in float32 or better.

    Source: sCM, appendix F.  Differs: the sum over keys is taken from dS before it meets v, not from y after.
    """
    wide, scale = at_least_float32(q.dtype), 1 / math.sqrt(q.shape[-1])
    qs, dqs = q.value * scale, q.tangent * scale
    P = (qs @ k.value.mT).softmax(-1, dtype=wide)
    dS = torch.cat([dqs, qs], -1) @ torch.cat([k.value, k.tangent], -1).mT
    dP = torch.ops.aten._softmax_backward_data(dS.to(wide), P, -1, wide)
    return Dual(function(q.value, k.value, v.value), dP.to(v.dtype) @ v.value + P.to(v.dtype) @ v.tangent)


RULES: dict[str, Function] = {
    **dict.fromkeys(("new_zeros", "ones_like"), constant),
    **dict.fromkeys(("reshape", "flatten", "transpose", "contiguous", "unbind", "chunk", "to", "neg"), linear),
    **dict.fromkeys(("avg_pool2d", "interpolate", "masked_fill"), linear),
    **dict.fromkeys(("linear", "conv2d", "conv_transpose2d"), affine),
    **dict.fromkeys(("add", "sub", "lerp"), sum_like),
    "pad": pad,
    "cat": cat,
    "mul": mul,
    "div": div,
    "pow": power,
    "reciprocal": pointwise(lambda x, y: -y * y),
    "sqrt": pointwise(lambda x, y: 0.5 / y),
    "exp": pointwise(lambda x, y: y),
    "log": pointwise(lambda x, y: 1 / x),
    "sin": pointwise(lambda x, y: x.cos()),
    "cos": pointwise(lambda x, y: -x.sin()),
    "tan": pointwise(lambda x, y: 1 + y * y),
    "clamp": clamp,
    "silu": silu,
    "group_norm": group_norm,
    "linalg_vector_norm": vector_norm,
    "scaled_dot_product_attention": attention,
}
