"""The hardware's options, which `train` and `plan` share."""

from dataclasses import fields
from typing import Any

import click
import pytest
from click.testing import CliRunner

from edmdistill.cli.machine_options import MachineOptions, machine_options
from edmdistill.cli.plan import command as plan
from edmdistill.cli.train import command as train
from edmdistill.machine.engine import Machine

CHANGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "shard": (["--shard"], {"shard": True}),
    "offload": (["--offload", "ema,teacher"], {"offload": ("ema", "teacher")}),
    "checkpoint_activations": (["--checkpoint-activations"], {"checkpointing": True}),
    "loss_pieces": (["--loss-pieces", "3"], {"loss_pieces": 3}),
    "second_moment": (["--second-moment", "bf16"], {"second_moment": "bf16"}),
    "compile_mode": (["--compile", "default"], {"compile": "default"}),
}


def machine(*words: str, short: bool = False) -> Machine:
    made: list[Machine] = []

    @click.command()
    @machine_options(short=short)
    def command(options: MachineOptions) -> None:
        made.append(options.machine(device="cpu"))

    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    return made[0]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("name", [field.name for field in fields(MachineOptions)])
def test_each_option_changes_its_part_of_the_machine_alone(name: str, short: bool) -> None:
    words, change = CHANGES[name]
    assert machine(short=short) == Machine(device="cpu")
    assert machine(*words, short=short) == Machine(device="cpu")._replace(**change)


def test_train_and_plan_have_them_all() -> None:
    for command in train, plan:
        options = {option for parameter in command.params for option in parameter.opts}
        assert options >= {words[0] for words, _ in CHANGES.values()}
