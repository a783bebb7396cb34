"""What says that a run is ill, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edmdistill.errors import TrainingError
from edmdistill.methods.base import Loss
from edmdistill.networks.flow import FlowNetwork
from edmdistill.training.engine import local
from edmdistill.trigflow import time_to_sigma


class Diverged(TrainingError):
    """A loss, a gradient or a weight is no longer a number."""


def diverged(turn: str, loss: Loss, networks: Mapping[str, nn.Module], images: int) -> Diverged:
    """The error that says where a turn went wrong, after its backward pass and before its step.

    Args:
        turn: the role that is trained.
        loss: of that turn.
        networks: all roles.
    """
    bad = ~loss.value.detach().isfinite()
    if bad.any():
        flow = next(network for network in networks.values() if isinstance(network, FlowNetwork))
        sigma = time_to_sigma(loss.t.detach()[bad], flow.sigma_data)
        what = f"the loss of {int(bad.sum())} of {len(bad)} samples, at sigma {sigma.min():.3g} to {sigma.max():.3g}"
    else:
        what = "the gradient, though not the loss"
    weights = ((f"{role}.{name}", p) for role, net in networks.items() for name, p in net.named_parameters())
    gradients = ((f"{turn}.{name}", p.grad) for name, p in networks[turn].named_parameters())
    where = _first_bad(weights)
    where = f"in the weights {where}" if where else f"in the gradient of {_first_bad(gradients)}"
    return Diverged(f"the {turn}'s turn after {images} images gave no finite number: {what}, first {where}")


def require_finite(
    networks: Mapping[str, nn.Module], images: int, anywhere: Callable[[bool], bool] = lambda said: said
) -> None:
    """Before a state is saved: it is one to go back to.

    Args:
        anywhere: whether any process says so, each of which may hold a shard.
    Raises: Diverged: a weight is NaN or infinite.
    """
    where = _first_bad((f"{role}.{name}", p) for role, net in networks.items() for name, p in net.named_parameters())
    if anywhere(where is not None):
        raise Diverged(f"after {images} images the weights {where or 'of another process'} are not finite")


def _first_bad(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    for name, tensor in tensors:
        if tensor is not None and not tensor.is_meta and not local(tensor).isfinite().all():
            return f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
    return None


class Alarm(NamedTuple):
    """A run that looks ill: what kind of illness, and one sentence."""

    kind: str
    sentence: str


# Seen on digits, by CoSIM and SiD. Healthy runs: diversity .56 at the start to .95, std ratio .90 to 1.00, mean off by
# .06 of the data's std, gradient norms that fall. A learning rate twelve times too high: std ratio 7, mean off by 11 in
# the first line, well again in the second. alpha 2.5 with coef .5, which eq. 38 forbids: std ratio 50, mean off by 100,
# gradient norms 500 times as high, for good.
PATIENCE = 2
"""Lines in a row that have to look ill."""
LEAST_DIVERSITY = 0.25
STD_RATIOS = 0.5, 2.0
MEAN_OFF = 0.5  # standard deviations of the data
GRADIENT_GROWTH = 20.0  # over the median of the lines so far


class Health:
    """Looks at every line of the metrics, and says once an episode what is wrong.

    It goes by the names that a method's measures have: what is not measured is not judged.
    """

    def __init__(self) -> None:
        self._ill: dict[str, int] = {}
        self._norms: dict[str, list[float]] = {}

    def judge(self, line: Mapping[str, float]) -> list[Alarm]:
        """The alarms that begin with this line."""
        found = dict(self._signs(line))
        self._ill = {kind: self._ill.get(kind, 0) + 1 for kind in found}
        return [
            Alarm(kind, f"After {line['images']:,.0f} images {what}.")
            for kind, what in found.items()
            if self._ill[kind] == PATIENCE
        ]

    def _signs(self, line: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        diversity = line.get("diversity", 1.0)
        if diversity < LEAST_DIVERSITY:
            yield (
                "collapse",
                f"the generated images vary {diversity:.2f} times as much as the data: the generator collapses; "
                "a lower training.lr or a higher share of small jumps can help",
            )
        for name in line:
            if not name.startswith("generated/mean/"):
                continue
            channel = name.rpartition("/")[2]
            mean, std = (line[f"generated/{kind}/{channel}"] for kind in ("mean", "std"))
            data_mean, data_std = (line[f"data/{kind}/{channel}"] for kind in ("mean", "std"))
            ratio, off = std / max(data_std, 1e-12), (mean - data_mean) / max(data_std, 1e-12)
            if not STD_RATIOS[0] < ratio < STD_RATIOS[1] or abs(off) > MEAN_OFF:
                yield (
                    "saturation",
                    f"channel {channel} of the generated images has {ratio:.2g} times the data's standard deviation "
                    f"and a mean {off:.2g} of these off: the generator runs away; try a lower training.lr or alpha",
                )
        for name in line:
            if not name.startswith("grad_norm/"):
                continue
            norms = self._norms.setdefault(name, [])
            usual = median(norms) if len(norms) >= 5 else line[name]
            if line[name] > GRADIENT_GROWTH * usual:
                yield (
                    "runaway",
                    f"the gradient of the {name.rpartition('/')[2]} is {line[name] / usual:.0f} times as large as it "
                    "was: training.grad_clip or a lower training.lr can help",
                )
            else:
                norms.append(line[name])


def fingerprints(
    networks: Mapping[str, nn.Module], total: Callable[[Tensor], Tensor] = lambda own: own
) -> dict[str, int]:
    """A number for each network that changes with any bit of its weights: the sum of their bits as integers.

    Args:
        total: the sum over processes, each of which may hold a shard.
    """
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}
    found = {}
    for role, network in networks.items():
        # A network in the host's memory shows its weights on the meta device, and cannot be trained.
        own = [local(p.detach()).view(bits[p.dtype]).sum() for p in network.parameters() if not p.is_meta]
        found[role] = int(total(torch.stack(own).sum())) if own else 0
    return found


def require_moved(turn: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Raises: TrainingError: a turn left its own network where it was, or moved another."""
    moved = [role for role in before if before[role] != after[role]]
    if moved != [turn]:
        raise TrainingError(
            f"the first turn of the {turn} moved {' and '.join(moved) or 'no network'} instead of the {turn} alone: "
            "check training.lr, and that the loss depends on that network"
        )
