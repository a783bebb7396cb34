"""Signs that a run goes wrong: numbers that are not finite, unhealthy metrics, networks that must not move."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edmdistill.checkpoints.run_state import HealthProgress
from edmdistill.errors import TrainingError, counted
from edmdistill.machine.engine import local_shard
from edmdistill.methods.base import Loss
from edmdistill.networks.flow import FlowNetwork
from edmdistill.trigflow import time_to_sigma


class Diverged(TrainingError):
    """A loss, a gradient or a weight is no longer finite, or an alarm ends the run.

    Attributes:
        advice: what to do, if training itself is not the cause.
        best: the checkpoint that the sentence calls the best, if it does.
    """

    def __init__(self, sentence: str, advice: str | None = None, best: Path | None = None) -> None:
        super().__init__(sentence)
        self.advice = advice
        self.best = best


def find_divergence(
    turn: str, loss: Loss, networks: Mapping[str, nn.Module], images: int, frozen: Collection[str] = (), data: str = ""
) -> Diverged:
    """Returns the error that says where a turn went wrong, and why, after its backward pass.

    Args:
        turn: the trained role.
        loss: of that turn.
        networks: all roles.
        frozen: the roles that are still as they were loaded.
        data: the first image that is not finite; "": there is none.
    """
    whose = f"the {turn}'s turn after {counted(images, 'image')} gave no finite number"
    if data:
        return Diverged(f"{whose}: the data hold NaN or infinity, first {data}", "give sound data and a new --run-dir")
    bad = ~loss.value.detach().isfinite()
    if bad.any():
        flow = next(network for network in networks.values() if isinstance(network, FlowNetwork))
        sigma = time_to_sigma(loss.t.detach()[bad], flow.sigma_data)
        what = f"the loss of {int(bad.sum())} of {len(bad)} samples, at sigma {sigma.min():.3g} to {sigma.max():.3g}"
    else:
        what = "the gradient, though not the loss"
    # Frozen roles first: they were not finite before training began.
    for role in sorted(networks, key=lambda role: role not in frozen):
        where = _first_bad((f"{role}.{name}", p) for name, p in networks[role].named_parameters())
        if where is not None:
            advice = f"give a {role} whose weights are finite, and a new --run-dir" if role in frozen else None
            return Diverged(f"{whose}: {what}, first in the weights {where}", advice)
    where = _first_bad((f"{turn}.{name}", p.grad) for name, p in networks[turn].named_parameters())
    # None: its norm alone overflows, it is another process's shard, or the loss has none.
    return Diverged(f"{whose}: {what}" + (f", first in the gradient of {where}" if where else ""))


def require_finite(networks: Mapping[str, nn.Module], images: int, any_process: Callable[[bool], bool] = bool) -> None:
    """Checks the weights before a state is saved, because a run may have to go back to it.

    Args:
        any_process: whether a flag is true on any process, each of which may hold a shard.
    Raises: Diverged: a weight is NaN or infinite.
    """
    where = _first_bad((f"{role}.{name}", p) for role, net in networks.items() for name, p in net.named_parameters())
    if any_process(where is not None):
        raise Diverged(f"after {counted(images, 'image')} the weights {where or 'of another process'} are not finite")


def _first_bad(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    for name, tensor in tensors:
        if tensor is not None and not tensor.is_meta and not local_shard(tensor).isfinite().all():
            return f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
    return None


class Alarm(NamedTuple):
    """A symptom that persists: its kind, one sentence, whether it is new, and the best checkpoint, if it names one."""

    kind: str
    sentence: str
    begins: bool = True
    best: Path | None = None


# Measured on digits, with CoSIM and SiD. Healthy runs: diversity .56 at the start to .95, std ratio .90 to 1.00, mean
# off by .06 of the data's std, falling gradient norms. A learning rate twelve times too high: std ratio 7, mean off by
# 11 in the first line, healthy in the second. alpha 2.5 with coef .5, which eq. 38 forbids: std ratio 50, mean off by
# 100, gradient norms 500 times as high, permanently.
ALARM_AFTER = 2
"""Number of lines in a row with the same symptom before an alarm."""
LEAST_DIVERSITY = 0.25
STD_RATIOS = 0.5, 2.0
MEAN_OFF = 0.5  # standard deviations of the data
GRADIENT_GROWTH = 20.0  # over the median of the healthy lines before, of which so many count:
NORMS = 1000


class Health:
    """Checks every line of the metrics, and raises an alarm after ALARM_AFTER lines in a row with the same symptom.

    It goes by the names of the measures: what is not measured is not checked.

    Args:
        progress: what `begin_interval` returned, to resume from.
    """

    def __init__(self, progress: HealthProgress | None = None) -> None:
        progress = progress or HealthProgress()
        self.last_healthy = progress.last_healthy
        self._streaks = dict(progress.streaks)
        self._norms = {name: deque(filter(None, norms), NORMS) for name, norms in progress.norms.items()}
        self._seen = set(progress.streaks)  # since the last state, or, without a line since then, in the last line
        self._has_line = False  # since the last state

    def check(self, line: Mapping[str, float]) -> list[Alarm]:
        """Returns the alarms that begin with this line, and those that persist."""
        symptoms = dict(self._symptoms(line))
        self._streaks = {kind: self._streaks.get(kind, 0) + 1 for kind in symptoms}
        self._seen = (self._seen if self._has_line else set()) | symptoms.keys()
        self._has_line = True
        if not symptoms:
            self.last_healthy = int(line["images"])
        return [
            Alarm(kind, f"After {line['images']:,.0f} images {symptom}.", self._streaks[kind] == ALARM_AFTER)
            for kind, symptom in symptoms.items()
            if self._streaks[kind] >= ALARM_AFTER
        ]

    def begin_interval(self) -> HealthProgress:
        """Returns what goes into a state; symptoms from here on belong to the next state."""
        seen, self._seen, self._has_line = sorted(self._seen), set(self._streaks), False
        norms = {name: list(values) for name, values in self._norms.items()}
        return HealthProgress(self._streaks, norms, self.last_healthy, seen)

    def _symptoms(self, line: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        diversity = line.get("diversity", 1.0)
        if diversity < LEAST_DIVERSITY:
            yield (
                "collapse",
                f"the generated images vary {diversity:.2f} times as much as the data: the generator collapses; "
                "a lower training.lr can help, or, for cosim, a higher method.R",
            )
        for name in filter(lambda name: name.startswith("generated/mean/"), line):
            channel = name.rpartition("/")[2]
            mean, std = (line[f"generated/{kind}/{channel}"] for kind in ("mean", "std"))
            data_mean, data_std = (line[f"data/{kind}/{channel}"] for kind in ("mean", "std"))
            ratio, off = std / max(data_std, 1e-12), (mean - data_mean) / max(data_std, 1e-12)
            if not STD_RATIOS[0] < ratio < STD_RATIOS[1] or abs(off) > MEAN_OFF:
                yield (
                    "saturation",
                    f"channel {channel} of the generated images has {ratio:.2g} times the data's standard deviation, "
                    f"and its mean is {abs(off):.2g} such deviations {'below' if off < 0 else 'above'} the data's: the "
                    "generator runs away; try a lower training.lr or, where the method has one, a lower method.alpha",
                )
        for name in filter(lambda name: name.startswith("grad_norm/"), line):
            norms = self._norms.setdefault(name, deque(maxlen=NORMS))
            usual = median(norms) if len(norms) >= 5 else line[name]
            if line[name] > GRADIENT_GROWTH * usual:
                yield (
                    "runaway",
                    f"the gradient of the {name.rpartition('/')[2]} is {line[name] / usual:.0f} times as large as it "
                    "was: training.grad_clip or a lower training.lr can help",
                )
            elif line[name]:  # 0: not learning yet, as a generator whose auxiliary score waits for fp16's loss scale
                norms.append(line[name])


def fingerprints(
    networks: Mapping[str, nn.Module], all_reduce: Callable[[Tensor], Tensor] = lambda local: local
) -> dict[str, int]:
    """Returns a checksum of each network's weights, which changes with any single bit: their sum as integers.

    Args:
        all_reduce: the sum over processes, each of which may hold a shard.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    checksums = {}
    for role, network in networks.items():
        # The weights of an offloaded network are on the meta device, and are not trained.
        sums = [
            local_shard(p.detach()).view(bits[p.element_size()]).sum() for p in network.parameters() if not p.is_meta
        ]
        checksums[role] = int(all_reduce(torch.stack(sums).sum())) if sums else 0
    return checksums


def require_moved(turn: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Raises: TrainingError: a turn left its own network where it was, or moved another."""
    moved = [role for role in before if before[role] != after[role]]
    if moved != [turn]:
        raise TrainingError(
            f"the first turn of the {turn} moved {' and '.join(moved) or 'no network'} instead of the {turn} alone: "
            "check training.lr, and that the loss depends on that network"
        )
