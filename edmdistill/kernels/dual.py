"""Tangents: a network called on Duals returns F and its derivative along a direction, in one pass.

A Dual (value, tangent) may stand wherever a tensor does: torch's functions dispatch to the rules registered by
`tangent_of`. The same code, a whole network and the path from time to noise condition included, so computes tangents
unchanged. Constants (weights, labels, dropout masks) stay tensors: a layer takes two convolutions, where func.jvp,
which cannot know that the weight is constant, takes three.

The value is computed by the same calls as for a tensor, so it equals the network's output without tangents, and carries
its gradient where gradients are enabled. Rules run without gradients: a tangent never has one. A function without a
rule raises; no tangent is ever dropped.

Here are the rules of shapes and arithmetic; an operation with a file of its own has its rule there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as f
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import register_pytree_node

Function = Callable[..., Any]

RULES: dict[str, Function] = {}
"""Tangent rules by the name that a function of torch and the method of Tensor share; filled by `tangent_of`."""


def tangent_of(*functions: Function) -> Callable[[Function], Function]:
    """Returns a decorator that registers the tangent rule of these functions.

    The rule is called as rule(function, y, *args, **kwargs), where y is what the function returned for the arguments'
    values. It returns the tangent of y, as many as y has tensors; None: y is a constant.
    """

    def register(rule: Function) -> Function:
        RULES.update({function.__name__: rule for function in functions})
        return rule

    return register


def with_tangent(rule: Function, function: Function, *args: Any, **kwargs: Any) -> Any:
    """Returns the function of arguments among which are Duals: its value, as autograd records it, and its tangent."""
    y = function(*map(value, args), **kwargs)
    with torch.no_grad():
        dy = rule(function, y, *args, **kwargs)
    return tuple(map(paired, y, dy)) if isinstance(dy, tuple) else paired(y, dy)


def paired(y: Tensor, dy: Tensor | None) -> Any:
    return y if dy is None else Dual(y, dy)


@dataclass(eq=False)
class Dual:
    """A tensor and its derivative along a direction, of the same shape and dtype.

    The value may have a gradient; the tangent has none. FSDP2 finds the value in it, and lets the gradient pass.

    Raises: ValueError: the shapes differ, the tangent has a gradient, or torch's own forward-mode differentiation is
        active.
    """

    value: Tensor
    tangent: Tensor

    def __post_init__(self) -> None:
        if self.value.shape != self.tangent.shape:
            raise ValueError(f"a value {list(self.value.shape)} cannot have a tangent {list(self.tangent.shape)}")
        if self.tangent.requires_grad:
            raise ValueError("a tangent cannot have a gradient: detach it")
        if forward_ad._current_level >= 0:
            raise ValueError("a Dual cannot be differentiated by func.jvp or forward_ad: use one or the other")

    @classmethod
    def __torch_function__(
        cls, function: Function, types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = RULES.get(function.__name__)
        if rule is None:
            raise NotImplementedError(f"{function.__name__} has no rule for tangents: write one in kernels/")
        return with_tangent(rule, function, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """Returns the Tensor method of that name, if it has a rule."""
        if name not in RULES:
            raise AttributeError(f"{name} has no rule for tangents: write one in kernels/")
        return partial(with_tangent, RULES[name], getattr(Tensor, name), self)

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
        return with_tangent(linear_rule, Tensor.__getitem__, self, index)

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


# Where FSDP2 looks for tensors: in dataclasses; in older versions of torch, in what is registered here.
register_pytree_node(Dual, lambda dual: ([dual.value, dual.tangent], None), lambda pair, _: Dual(*pair))


def value(x: Any) -> Any:
    """Returns the value of a Dual, and of those in a list; a constant as it is."""
    if isinstance(x, list):
        return [value(part) for part in x]
    return x.value if isinstance(x, Dual) else x


def tangent(x: Any) -> Any:
    """Returns the tangent of a Dual; zeros for a constant."""
    return x.tangent if isinstance(x, Dual) else torch.zeros_like(x) if isinstance(x, Tensor) else 0.0


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# Rules: the function, what it returned, then its arguments.


@tangent_of(Tensor.new_zeros, torch.ones_like)
def constant(function: Function, y: Tensor, x: Dual, *args: Any, **kwargs: Any) -> None:
    """No tangent: the function reads shape, dtype and device alone."""


@tangent_of(Tensor.reshape, Tensor.flatten, Tensor.transpose, Tensor.permute, Tensor.contiguous)
@tangent_of(Tensor.unbind, Tensor.chunk, Tensor.to, Tensor.neg)
def linear_rule(function: Function, y: Any, x: Dual, *args: Any, **kwargs: Any) -> Any:
    """f(dx)."""
    return function(x.tangent, *args, **kwargs)


def affine_rule(
    function: Function, y: Tensor, x: Dual, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """W dx, of y = W x + b."""
    return function(x.tangent, weight, None, *args, **kwargs)


@tangent_of(torch.add, torch.sub, torch.lerp)
def jointly_linear(function: Function, y: Tensor, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
    """f(da, db), of f linear in both at once."""
    return function(tangent(a), tangent(b), *args, **kwargs)


@tangent_of(torch.cat)
def cat(function: Function, y: Tensor, tensors: Sequence[Any], dim: int = 0) -> Any:
    return function([tangent(x) for x in tensors], dim)


@tangent_of(torch.mul)
def mul(function: Function, y: Tensor, a: Any, b: Any) -> Any:
    if isinstance(a, Dual) and isinstance(b, Dual):
        return torch.addcmul(a.tangent * b.value, a.value, b.tangent)
    return a.tangent * b if isinstance(a, Dual) else a * b.tangent


@tangent_of(torch.div)
def div(function: Function, y: Tensor, a: Any, b: Any) -> Any:
    """(da - (a / b) db) / b."""
    if not isinstance(b, Dual):
        return a.tangent / b
    return torch.addcmul(tangent(a), y, b.tangent, value=-1) / b.value


@tangent_of(torch.pow)
def power(function: Function, y: Tensor, x: Dual, exponent: float) -> Any:
    return exponent * x.value ** (exponent - 1) * x.tangent


@tangent_of(torch.clamp)
def clamp(function: Function, y: Tensor, x: Dual, min_val: float, max_val: float) -> Any:
    """At the bounds, as within them: a time at the end of its range has a tangent.  torch from 2.15 on has 0 there."""
    return x.tangent * ((x.value >= min_val) & (x.value <= max_val))


@tangent_of(f.hardtanh)
def hardtanh(function: Function, y: Tensor, x: Dual, min_val: float, max_val: float, inplace: bool = False) -> Any:
    return torch.ops.aten.hardtanh_backward(x.tangent, x.value, min_val, max_val)


@tangent_of(f.silu)
def silu(function: Function, y: Tensor, x: Dual, inplace: bool = False) -> Any:
    """A diagonal Jacobian is its own transpose, so torch's backward kernel is the forward derivative."""
    return torch.ops.aten.silu_backward(x.tangent, x.value)


def pointwise(function: Function, slope: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Registers the rule of y = f(x) with slope(x, y) = f'(x)."""

    @tangent_of(function)
    def rule(function: Function, y: Tensor, x: Dual) -> Tensor:
        return slope(x.value, y) * x.tangent


pointwise(torch.reciprocal, lambda x, y: -y * y)
pointwise(torch.sqrt, lambda x, y: 0.5 / y)
pointwise(torch.exp, lambda x, y: y)
pointwise(torch.log, lambda x, y: 1 / x)
pointwise(torch.sin, lambda x, y: x.cos())
pointwise(torch.cos, lambda x, y: -x.sin())
pointwise(torch.tan, lambda x, y: 1 + y * y)
