"""The options that say how a run uses the hardware, which `train` has and `plan` knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edmdistill.cli.options import compile_option, option_group, second_moment_option
from edmdistill.cli.types import COMPILE, Count, Name, NameList

if TYPE_CHECKING:
    from edmdistill.machine.engine import Machine, SecondMoment
    from edmdistill.recipes.schema import CompileMode

OFFLOADS = ("ema", "teacher", "optimizer")
SHORT = "As for train."


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """The options of `machine_options`, as they were typed."""

    shard: bool
    offload: tuple[str, ...]
    checkpoint_activations: bool
    loss_pieces: int
    second_moment: SecondMoment
    compile_mode: CompileMode | None

    def machine(self, **others: Any) -> Machine:
        """Returns the machine that they stand for.  others: fields of it that have other options."""
        from edmdistill.machine.engine import Machine

        return Machine(
            shard=self.shard,
            offload=self.offload,
            checkpointing=self.checkpoint_activations,
            loss_pieces=self.loss_pieces,
            second_moment=self.second_moment,
            compile=self.compile_mode,
            **others,
        )


def machine_options(*, short: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds these options; the command gets them as one `options`.

    Args:
        short: refer to the help of train.
    """

    def help(text: str) -> str:
        return SHORT if short else text

    return option_group(
        "options",
        MachineOptions,
        click.option(
            "--shard",
            is_flag=True,
            help=help("Share networks, optimizers and averages out over the processes (FSDP2)."),
        ),
        click.option("--offload", type=NameList(OFFLOADS), default=(), help=help("What waits in the host's memory.")),
        click.option("--checkpoint-activations", is_flag=True, help=help("Compute activations twice to hold fewer.")),
        click.option(
            "--loss-pieces",
            type=Count(min=1),
            default=1,
            help=help("Pieces in which the generator's loss goes through teacher and auxiliary score."),
        ),
        second_moment_option,
        click.option("--compile", "compile_mode", type=Name(COMPILE), help=SHORT)
        if short
        else compile_option(None, "the recipe's, off"),
    )
