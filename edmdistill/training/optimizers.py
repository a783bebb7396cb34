"""The optimizers of recipes, their states in files, and learning rates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from edmdistill.errors import TrainingError
from edmdistill.machine.engine import SecondMoment
from edmdistill.optional import importing
from edmdistill.recipes.schema import TrainingTable
from edmdistill.training.adam import OffloadedAdam, make_adam


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    training: TrainingTable,
    offload: bool = False,
    second_moment: SecondMoment = "fp32",
) -> torch.optim.Optimizer:
    """Returns a role's optimizer.

    Args:
        offload: keeps its states, and takes its steps, in the host's memory.
        second_moment: Adam's, see `LeanAdam`; not of other optimizers.
    Raises: TrainingError: torchao cannot be imported.
    """
    options: dict[str, Any] = {"lr": training.lr, "betas": training.betas, "eps": training.eps}
    if training.optimizer == "adam":
        make = OffloadedAdam if offload else make_adam
        return make(parameters, training.seed, second_moment, **options)
    if training.optimizer == "radam":
        return torch.optim.RAdam(list(parameters), **options)
    with importing("torchao", extra="lowbit", needed_by="adam8bit needs", error=TrainingError):
        from torchao.optim import Adam8bit
    made: torch.optim.Optimizer = Adam8bit(list(parameters), **options)
    return made


def state_bytes(training: TrainingTable, second_moment: SecondMoment = "fp32") -> int:
    """Returns the bytes that an optimizer keeps for each parameter."""
    if training.optimizer == "adam8bit":
        return 2
    if training.optimizer != "adam":
        return 8
    return (4 if training.betas[0] else 0) + (2 if second_moment == "bf16" else 4)


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
