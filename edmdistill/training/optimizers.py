"""Optimizers, in the device's memory or the host's, and learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adam import adam

from edmdistill.errors import TrainingError
from edmdistill.recipes.schema import TrainingTable
from edmdistill.transfer import host_block, wait_for


def make_optimizer(
    parameters: Iterable[nn.Parameter], training: TrainingTable, offload: bool = False
) -> torch.optim.Optimizer:
    """Returns a role's optimizer.

    Args:
        offload: keeps its states, and takes its steps, in the host's memory.
    Raises: TrainingError: offload is for Adam alone; or torchao is not installed.
    """
    options: dict[str, Any] = {"lr": training.lr, "betas": training.betas, "eps": training.eps}
    if training.optimizer == "adam":
        return OffloadedAdam(parameters, **options) if offload else make_adam(parameters, **options)
    if offload:
        raise TrainingError(
            f"--offload optimizer is for adam, but the recipe uses {training.optimizer}: leave out one of them"
        )
    if training.optimizer == "radam":
        return torch.optim.RAdam(list(parameters), **options)
    try:
        from torchao.optim import Adam8bit
    except ImportError as error:
        raise TrainingError(
            "adam8bit needs torchao, which is not installed: pip install 'edmdistill[lowbit]'"
        ) from error
    made: torch.optim.Optimizer = Adam8bit(list(parameters), **options)
    return made


def make_adam(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Adam:
    """Returns Adam in torch's fused kernel; at beta1 = 0, without the average of gradients, which is the gradient."""
    kind = torch.optim.Adam if options["betas"][0] else MomentumFreeAdam
    return kind(list(parameters), **options, fused=True)


def state_bytes(training: TrainingTable) -> int:
    """Returns the bytes that an optimizer keeps for each parameter."""
    if training.optimizer == "adam8bit":
        return 2
    return 4 if training.optimizer == "adam" and training.betas[0] == 0 else 8


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def plain_states(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Returns the states of each parameter by its index, as tensors that a file can hold.

    A tensor subclass that is made of others, as in 8 bits, is taken apart: exp_avg:codes, exp_avg:scale ...
    """
    states: dict[int, dict[str, Tensor]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        states[index] = {}
        for key, value in state.items():
            inner = [] if isinstance(value, DTensor) else getattr(value, "tensor_attrs", [])
            states[index] |= {f"{key}:{name}": getattr(value, name) for name in inner} or {key: value}
    return states


def load_states(optimizer: torch.optim.Optimizer, states: dict[int, dict[str, Tensor]]) -> None:
    """Loads what `plain_states` returned."""
    whole: dict[int, dict[str, Any]] = {}
    for index, state in states.items():
        whole[index] = {key: value for key, value in state.items() if ":" not in key}
        for key in {key.partition(":")[0] for key in state.keys() - whole[index].keys()}:
            from torchao.optim.subclass_8bit import OptimState8bit

            inner = (state[f"{key}:{name}"] for name in OptimState8bit.tensor_attrs)
            whole[index][key] = OptimState8bit(*inner, signed=key == "exp_avg")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": whole})


class MomentumFreeAdam(torch.optim.Adam):
    """Adam at beta1 = 0, with half of its states and the same bits: the gradient itself serves as its average.

    Its states are `step` and `exp_avg_sq`, and it loads those of torch's Adam.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moved:
                if not self.state[parameter]:
                    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    self.state[parameter] = {"step": step, "exp_avg_sq": torch.zeros_like(parameter)}
            gradients = [parameter.grad for parameter in moved]
            states = [self.state[parameter] for parameter in moved]
            adam(
                moved,
                gradients,
                gradients,  # the kernel writes 0 average + 1 gradient here, which changes nothing
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=0.0,
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = {
            index: {key: value for key, value in state.items() if key != "exp_avg"}
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": states})


class OffloadedAdam(torch.optim.Optimizer):
    """Adam on copies of the weights in the host's memory; the device holds weights and gradients alone.

    Weights and gradients travel through pinned memory that stays, and the host waits once a step. The states are those
    of Adam itself.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, options)
        self._parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._device = self._parameters[0].device
        self._copies = [nn.Parameter(copy) for copy in host_block(self._parameters, self._device)]
        self._gradients = host_block(self._parameters, self._device)
        self._adam = make_adam(self._copies, **options)
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


def learning_rate(training: TrainingTable, role: str, images: int) -> float:
    """Returns the learning rate of a step before which `images` were seen.

    Source: EDM, training_loop.py, for the ramp-up; EDM2, eq. 67, for inverse_sqrt.
    Differs: the ramp-up counts the step's own batch too, so that the first step moves something.
    """
    rate = training.lr_by_role.get(role, training.lr)
    if training.lr_rampup_images:
        rate *= min(1.0, (images + training.batch) / training.lr_rampup_images)
    if training.lr_decay == "linear":
        rate *= min(1.0, (training.images - images) / (training.images * training.decay_share))
    if training.decay_images is not None:
        rate /= max(1.0, images / training.decay_images) ** 0.5
    return rate
