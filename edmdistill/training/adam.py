"""Adam with fewer states, in the device's memory or the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from edmdistill.draws import words
from edmdistill.machine.engine import SecondMoment, local_shard
from edmdistill.transfer import host_block, wait_for

CHUNK = 2**22
"""Numbers of a second moment in bfloat16 that are in float32 at one time, or those of one parameter, if it has more."""


def make_adam(
    parameters: Iterable[nn.Parameter], seed: int, second_moment: SecondMoment, **options: Any
) -> torch.optim.Adam:
    """Returns Adam in torch's fused kernel; torch's own where it has no state to save.

    Args:
        seed: of roundings at random.
    """
    if second_moment == "fp32" and options["betas"][0]:
        return torch.optim.Adam(list(parameters), **options, fused=True)
    return LeanAdam(list(parameters), seed, second_moment, **options)


class LeanAdam(torch.optim.Adam):
    """Adam with fewer states; it loads those of torch's Adam.

    At beta1 = 0 it has no `exp_avg`, with the same bits: the gradient itself serves as its average. In bfloat16,
    `exp_avg_sq` has half of its bytes, and is rounded at random in every step. Rounded to the nearest it would stall:
    a step changes v by (1 - beta2) (g^2 - v), and what is less than half of the distance of two numbers, .002 to .004
    of v, would be lost. Rounded at random it is unbiased. Its relative error (root mean square) is at most
    .0025 / sqrt(1 - beta2^2): of normal gradients, 1.8% at beta2 = .99 and 4.3% at .999. That of the step, which is
    divided by sqrt(v), is half of it.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], seed: int, second_moment: SecondMoment, **options: Any
    ) -> None:
        super().__init__(parameters, **options, fused=True)
        self.dtype = torch.bfloat16 if second_moment == "bf16" else None
        """Of `exp_avg_sq`; None: that of the weights."""
        # The spawn key tells it from the seeds of Draws.
        self._root = int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1, np.uint64).view(np.int64)[0])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moved:
                if not self.state[parameter]:
                    self.state[parameter] = self._first_state(parameter, bool(group["betas"][0]))
            moved = [parameter for parameter in moved if local_shard(parameter).numel()]  # some shards are empty
            if self.dtype is None:
                self._update(group, moved, [local_shard(self.state[p]["exp_avg_sq"]) for p in moved])
                continue
            for piece, some in enumerate(chunks(moved)):
                # A stream of its own for each step, whose number is on the device, which need not be waited for.
                key = words(self.state[some[0]]["step"].to(torch.int64).view(1) + self._root, 1)[:, 0]
                with widened([local_shard(self.state[p]["exp_avg_sq"]) for p in some], key, piece) as wide:
                    self._update(group, some, wide)

    def _first_state(self, parameter: nn.Parameter, averages: bool) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        average = {"exp_avg": torch.zeros_like(parameter)} if averages else {}
        return {"step": step} | average | {"exp_avg_sq": torch.zeros_like(parameter, dtype=self.dtype)}

    def _update(self, group: dict[str, Any], parameters: list[nn.Parameter], moments: list[Tensor]) -> None:
        """Takes the step of some parameters.  moments: the second ones, in float32; of sharded ones, the shards."""
        states = [self.state[parameter] for parameter in parameters]
        gradients = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
        averages = [local_shard(state["exp_avg"]) for state in states] if group["betas"][0] else gradients
        adam(
            [local_shard(parameter) for parameter in parameters],
            gradients,
            averages,  # at beta1 = 0 the kernel writes 0 average + 1 gradient here, which changes nothing
            moments,
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        drop = () if self.param_groups[0]["betas"][0] else ("exp_avg",)
        states = {
            index: {key: value for key, value in state.items() if key not in drop}
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": states})
        for state in self.state.values():  # torch casts states to the dtype of the weights
            state["exp_avg_sq"] = state["exp_avg_sq"].to(self.dtype or state["exp_avg_sq"].dtype)


def chunks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yields the parameters, as many at a time as have CHUNK numbers on this process, or one that has more."""
    some: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        count = local_shard(parameter).numel()
        if some and size + count > CHUNK:
            yield some
            some, size = [], 0
        some.append(parameter)
        size += count
    if some:
        yield some


@contextmanager
def widened(stored: Sequence[Tensor], key: Tensor, piece: int) -> Iterator[list[Tensor]]:
    """Yields tensors in float32, of the same layouts; afterwards, what they hold by then is stored, rounded at random.

    Args:
        key, piece: of the random numbers, as for `draws.words`.  [1] int64
    """
    sizes = [tensor.numel() for tensor in stored]
    flat = torch.empty(sum(sizes), device=stored[0].device)
    starts = accumulate(sizes, initial=0)
    wide = [
        flat.as_strided(tensor.shape, tensor.stride(), start) for tensor, start in zip(stored, starts, strict=False)
    ]
    torch._foreach_copy_(wide, list(stored))
    yield wide
    round_at_random_(flat, words(key, -(-len(flat) // 4), piece)[0])
    torch._foreach_copy_(list(stored), wide)


def round_at_random_(x: Tensor, words: Tensor) -> None:
    """Rounds float32 to numbers that bfloat16 has, in place: to one of the two next to x, whose expectation is x.

    The lower half of x's bits, a 16-bit fraction of the distance of the two, is the probability of the upper one.

    Args:
        x: finite.  [N]
        words: random bits, 16 for each number.  [N/4] int64
    """
    bits = x.view(torch.int32)
    bits += words.view(torch.int16)[: len(x)]
    bits += 2**15  # random numbers from 0 on
    bits &= -(2**16)


class OffloadedAdam(torch.optim.Optimizer):
    """Adam on copies of the weights in the host's memory; the device holds weights and gradients alone.

    Weights and gradients travel through pinned memory that stays, and the host waits once a step. The states are those
    of Adam itself.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], seed: int, second_moment: SecondMoment, **options: Any
    ) -> None:
        super().__init__(parameters, options)
        self._parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._device = self._parameters[0].device
        self._copies = [nn.Parameter(copy) for copy in host_block(self._parameters, self._device)]
        self._gradients = host_block(self._parameters, self._device)
        self._adam = make_adam(self._copies, seed, second_moment, **options)
        # The same objects, so that learning rates and states set here are set there.
        self.state = self._adam.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        moved = [index for index, parameter in enumerate(self._parameters) if parameter.grad is not None]
        for index in moved:
            # The weights too: forced weight normalization has changed them since the last step.
            self._copies[index].copy_(self._parameters[index], non_blocking=True)
            self._gradients[index].copy_(self._parameters[index].grad, non_blocking=True)
            self._copies[index].grad = self._gradients[index]
        wait_for(self._device)
        for group, inner in zip(self.param_groups, self._adam.param_groups, strict=True):
            inner["lr"] = group["lr"]
        self._adam.step()
        for index in moved:
            self._parameters[index].copy_(self._copies[index], non_blocking=True)
            self._copies[index].grad = None

    def state_dict(self) -> dict[str, Any]:
        return self._adam.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._adam.load_state_dict(state_dict)
        self.state = self._adam.state
