"""Settings in which the methods' losses are known: tiny networks, Gaussian data, and CoSIM's mutants."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from methods_toys import answer
from torch import Tensor, nn

from edmdistill import schedules
from edmdistill.methods import cosim
from edmdistill.methods.base import Batch, NoiseRange, Role
from edmdistill.methods.cosim import CoSIM
from edmdistill.networks.levels import Layer
from edmdistill.networks.surgery.last_layer import LastLayer, watched
from edmdistill.trigflow import cos_sin

FlowFunction = Callable[..., Tensor]
SHAPE, LABELS = (3, 2, 2), 3
NUMBERS = math.prod(SHAPE)


class Tiny(nn.Module):
    """F(x_t, t, labels[, second][, w][, a]) of some random weights, smooth in all that it reads; and u(t)."""

    def __init__(self, role: Role, dtype: torch.dtype) -> None:
        super().__init__()
        self.two_time, self.guided, self.augment_dim = role.two_time, role.guided, role.augment_dim
        self.head = nn.Linear(2, role.logvars, dtype=dtype) if role.logvars else None
        inputs = NUMBERS + 2 + LABELS + 2 * role.two_time + role.guided + role.augment_dim
        self.hidden = nn.Linear(inputs, 5, dtype=dtype)
        self.out = nn.Linear(5, NUMBERS, dtype=dtype)
        self.judge = nn.Linear(5, 1, dtype=dtype) if role.head == "bottleneck" else nn.Identity()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None,
        second: Tensor | None = None,
        *,
        u_at=(),
        w=None,
        logits="none",
        features=False,
        along=(),
        augment_labels=None,
    ):
        if along:
            moving = (x_t, t) if second is None else (x_t, t, second)
            u = (self.head(self.read(at, x_t))[:, head] for head, at in enumerate(u_at))
            return answer(
                lambda x, t, *s: self(x, t, labels, *s, w=w, augment_labels=augment_labels), moving, along, *u
            )
        assert x_t.shape[1:] == SHAPE
        assert (second is not None) == self.two_time
        assert (w is not None) == self.guided
        assert augment_labels is None or self.augment_dim
        labels = x_t.new_zeros(len(x_t), LABELS) if labels is None else labels
        more = [self.read(second, x_t)] if second is not None else []
        more += [w[:, None].to(x_t.dtype)] if w is not None else []
        if self.augment_dim:
            more += [x_t.new_zeros(len(x_t), self.augment_dim) if augment_labels is None else augment_labels]
        hidden = self.hidden(torch.cat([x_t.flatten(1) / 0.5, self.read(t, x_t), labels, *more], 1)).tanh()
        if features:
            return self.out(hidden)[:, :, None, None], hidden[:, :, None, None]
        F = self.out(hidden).reshape(x_t.shape)
        if logits != "none":
            judged = self.judge(hidden)
            return (F, judged) if logits == "also" else judged
        return (F, *(self.head(self.read(at, x_t))[:, head] for head, at in enumerate(u_at))) if u_at else F

    @staticmethod
    def read(t: Tensor, x_t: Tensor) -> Tensor:
        return torch.stack([t.cos(), t.sin()], 1).to(x_t.dtype)

    def watch(self) -> contextlib.AbstractContextManager[LastLayer]:
        return watched(self.out)


@pytest.fixture
def noise() -> NoiseRange:
    return NoiseRange(sigma_data=0.5, sigma_min=0.002, sigma_max=80.0)


@pytest.fixture
def tiny_networks() -> Callable[..., dict[str, nn.Module]]:
    """(method, seed, dtype, options) -> a random network for each role."""

    def make(method: type, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, nn.Module]:
        layers = [Layer(1, "block0", 4, width, attention=False) for width in (NUMBERS, 5)]
        network = SimpleNamespace(feature_layers=layers)
        flow = SimpleNamespace(img_channels=SHAPE[0], img_resolution=SHAPE[1], network=network)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return {
                name: role.make(flow, seed).to(dtype) if role.make else Tiny(role, dtype)
                for name, role in method.roles_for(method.Config(**options)).items()
            }

    return make


@pytest.fixture
def tiny_batch() -> Callable[..., Batch]:
    """(size, seed, dtype) -> random images and one-hot labels for the tiny networks."""

    def make(size: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
        rng = torch.Generator().manual_seed(seed)
        x0 = torch.randn(size, *SHAPE, generator=rng, dtype=dtype) * 0.5
        return Batch(x0, nn.functional.one_hot(torch.arange(size) % LABELS, LABELS).to(dtype))

    return make


class Scripted:
    """Draws whose normal numbers are given beforehand, in the order of the calls."""

    def __init__(self, *normals: Tensor) -> None:
        self.normals = list(normals)

    def normal_like(self, x: Tensor, std: float = 1.0) -> Tensor:
        return self.normals.pop(0) * std


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture
def gaussian_flow() -> Callable[[Tensor, Tensor], FlowFunction]:
    """(mean [D], covariance [D,D]) of the data, sigma_data .5 -> the F that every velocity's mean is.

    x_t ~ N(cos mean, V) with V = cos^2 covariance + sin^2 sigma_data^2, and so
    sigma_data F = E[v | x_t] = -sin mean + sin cos (sigma_data^2 - covariance) V^-1 (x_t - cos mean).
    """

    def make(mean: Tensor, covariance: Tensor) -> FlowFunction:
        eye = torch.eye(len(mean), dtype=mean.dtype)

        def F(x_t: Tensor, t: Tensor, labels: Tensor | None = None, second: Tensor | None = None) -> Tensor:
            cos, sin = (part.flatten(1)[:, :, None] for part in cos_sin(t, x_t))
            V = cos**2 * covariance + sin**2 * 0.25 * eye
            whitened = torch.linalg.solve(V, x_t.flatten(1)[:, :, None] - cos * mean[:, None])
            v = sin * cos * (0.25 * eye - covariance) @ whitened - sin * mean[:, None]
            return (v / 0.5).reshape(x_t.shape)

        return F

    return make


@pytest.fixture
def cubature() -> Callable[[int, int], Tensor]:
    """(blocks, D) -> points [blocks,2 n,D,1,1], n = blocks D, whose mean is exact for quadratics of n unit normals."""

    def make(blocks: int, dim: int) -> Tensor:
        n = blocks * dim
        eye = n**0.5 * torch.eye(n, dtype=torch.float64)
        return torch.cat([eye, -eye]).reshape(2 * n, blocks, dim, 1, 1).transpose(0, 1)

    return make


def _losses(name: str, change: Callable[..., dict]) -> Callable[[pytest.MonkeyPatch], type[CoSIM]]:
    """A mutant that calls a loss of semi_implicit with some arguments changed."""
    real = getattr(cosim, name)

    def mutant(F_aux: Tensor, F_teacher: Tensor, v: Tensor, s: Tensor, **options):
        arguments = {"F_aux": F_aux, "F_teacher": F_teacher, "v": v, "s": s, **options}
        return real(**(arguments | change(**arguments)))

    def apply(monkeypatch: pytest.MonkeyPatch) -> type[CoSIM]:
        monkeypatch.setattr(cosim, name, mutant)
        return CoSIM

    return apply


def _auxiliary(times: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., type[CoSIM]]:
    """A mutant whose auxiliary score is called with other times than (s, t)."""

    class Mutant(CoSIM):
        def __init__(self, config, networks, noise) -> None:
            def auxiliary(x_s: Tensor, s: Tensor, labels: Tensor | None, t: Tensor) -> Tensor:
                s, t = times(s, t)
                return networks["auxiliary"](x_s, s, labels, t)

            super().__init__(config, {**networks, "auxiliary": auxiliary}, noise)

    return lambda monkeypatch: Mutant


def _flipped(monkeypatch: pytest.MonkeyPatch) -> type[CoSIM]:
    curve = schedules.edm_curve
    monkeypatch.setattr(schedules, "edm_curve", lambda r, *args: curve(1 - r, *args))
    return CoSIM


def _attached(monkeypatch: pytest.MonkeyPatch) -> type[CoSIM]:
    monkeypatch.setattr(cosim, "torch", SimpleNamespace(no_grad=contextlib.nullcontext))
    return CoSIM


def _attached_weight(monkeypatch: pytest.MonkeyPatch) -> type[CoSIM]:
    real = cosim.generator_loss

    def mutant(F_aux: Tensor, F_teacher: Tensor, v: Tensor, s: Tensor, **options):
        loss = real(F_aux, F_teacher, v, s, **options)
        size = (v - options["sigma_data"] * F_teacher).abs().flatten(1).mean(1)
        return loss._replace(value=loss.value * size.detach() / size)

    monkeypatch.setattr(cosim, "generator_loss", mutant)
    return CoSIM


MUTANTS = {
    "alpha's sign": _losses("generator_loss", lambda alpha, **_: {"alpha": -alpha}),
    "psi detached": _losses("generator_loss", lambda F_aux, **_: {"F_aux": F_aux.detach()}),
    "teacher detached": _losses("generator_loss", lambda F_teacher, **_: {"F_teacher": F_teacher.detach()}),
    "both detached": _losses(
        "generator_loss",
        lambda F_aux, F_teacher, **_: {"F_aux": F_aux.detach(), "F_teacher": F_teacher.detach()},
    ),
    "generator detached": _losses("generator_loss", lambda v, **_: {"v": v.detach()}),
    "weight attached": _attached_weight,
    "beta doubled": _losses("auxiliary_loss", lambda beta, **_: {"beta": 2 * beta}),
    "psi's target attached": _attached,
    "psi without t": _auxiliary(lambda s, t: (s, s)),
    "psi's times swapped": _auxiliary(lambda s, t: (t, s)),
    "r flipped": _flipped,
}


@pytest.fixture
def mutant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type[CoSIM]]:
    """name -> CoSIM with that mistake in it, until the test ends."""
    return lambda name: MUTANTS[name](monkeypatch)
