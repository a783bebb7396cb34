"""What says that a run is ill, and where."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edmdistill.checkpoints.run_state import HealthProgress
from edmdistill.errors import TrainingError
from edmdistill.machine.engine import local_shard
from edmdistill.methods.base import Loss
from edmdistill.networks.flow import FlowNetwork
from edmdistill.trigflow import time_to_sigma


class Diverged(TrainingError):
    """A loss, a gradient or a weight is no longer a number, or an alarm ends the run.

    Attributes:
        advice: what to do about it, where the training itself is not to blame.
    """

    def __init__(self, sentence: str, advice: str | None = None) -> None:
        super().__init__(sentence)
        self.advice = advice


def diverged(
    turn: str, loss: Loss, networks: Mapping[str, nn.Module], images: int, frozen: Collection[str] = (), data: str = ""
) -> Diverged:
    """Returns the error that says where a turn went wrong, and what is to blame, after its backward pass.

    Args:
        turn: the role that is trained.
        loss: of that turn.
        networks: all roles.
        frozen: the roles that are as they were loaded.
        data: the first image that holds a number that is not finite; "": there is none.
    """
    whose = f"the {turn}'s turn after {images} images gave no finite number"
    if data:
        return Diverged(f"{whose}: the data hold NaN or infinity, first {data}", "give sound data and a new --run-dir")
    bad = ~loss.value.detach().isfinite()
    if bad.any():
        flow = next(network for network in networks.values() if isinstance(network, FlowNetwork))
        sigma = time_to_sigma(loss.t.detach()[bad], flow.sigma_data)
        what = f"the loss of {int(bad.sum())} of {len(bad)} samples, at sigma {sigma.min():.3g} to {sigma.max():.3g}"
    else:
        what = "the gradient, though not the loss"
    # What is loaded and never trained comes first: it was not finite before any other weight was not.
    for role in sorted(networks, key=lambda role: role not in frozen):
        where = _first_bad((f"{role}.{name}", p) for name, p in networks[role].named_parameters())
        if where is not None:
            advice = f"give a {role} whose weights are finite, and a new --run-dir" if role in frozen else None
            return Diverged(f"{whose}: {what}, first in the weights {where}", advice)
    gradients = ((f"{turn}.{name}", p.grad) for name, p in networks[turn].named_parameters())
    return Diverged(f"{whose}: {what}, first in the gradient of {_first_bad(gradients)}")


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
        if tensor is not None and not tensor.is_meta and not local_shard(tensor).isfinite().all():
            return f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
    return None


class Alarm(NamedTuple):
    """A run that looks ill: what kind of illness, one sentence, and whether it is news."""

    kind: str
    sentence: str
    begins: bool = True


# Seen on digits, by CoSIM and SiD. Healthy runs: diversity .56 at the start to .95, std ratio .90 to 1.00, mean off by
# .06 of the data's std, gradient norms that fall. A learning rate twelve times too high: std ratio 7, mean off by 11 in
# the first line, well again in the second. alpha 2.5 with coef .5, which eq. 38 forbids: std ratio 50, mean off by 100,
# gradient norms 500 times as high, for good.
PATIENCE = 2
"""Lines in a row that have to look ill."""
LEAST_DIVERSITY = 0.25
STD_RATIOS = 0.5, 2.0
MEAN_OFF = 0.5  # standard deviations of the data
GRADIENT_GROWTH = 20.0  # over the median of the healthy lines before, of which so many count:
NORMS = 1000


class Health:
    """Looks at every line of the metrics, and raises an alarm where it looks ill for PATIENCE lines in a row.

    It goes by the names that a method's measures have: what is not measured is not judged.

    Args:
        past: what `begin_window` gave, to go on from there.
    """

    def __init__(self, past: HealthProgress | None = None) -> None:
        past = past or HealthProgress()
        self._ill = dict(past.ill)
        self._norms = {name: deque(norms, NORMS) for name, norms in past.norms.items()}
        self._found = set(past.ill)  # since the last state, or, if no line has come since then, in the last line
        self._judged = False
        self.well = past.well

    def judge(self, line: Mapping[str, float]) -> list[Alarm]:
        """Returns the alarms that begin with this line, and those that last."""
        found = dict(self._signs(line))
        self._ill = {kind: self._ill.get(kind, 0) + 1 for kind in found}
        self._found = (self._found if self._judged else set()) | found.keys()
        self._judged = True
        if not found:
            self.well = int(line["images"])
        return [
            Alarm(kind, f"After {line['images']:,.0f} images {what}.", self._ill[kind] == PATIENCE)
            for kind, what in found.items()
            if self._ill[kind] >= PATIENCE
        ]

    def begin_window(self) -> HealthProgress:
        """Returns what goes into a state; what is found from here on belongs to the next one."""
        found, self._found, self._judged = sorted(self._found), set(self._ill), False
        norms = {name: list(values) for name, values in self._norms.items()}
        return HealthProgress(self._ill, norms, self.well, found)

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
            norms = self._norms.setdefault(name, deque(maxlen=NORMS))
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
        own = [local_shard(p.detach()).view(bits[p.dtype]).sum() for p in network.parameters() if not p.is_meta]
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
