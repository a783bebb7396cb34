"""Options of other programs are refused with what they are called here."""

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from edmdistill.cli import main
from edmdistill.cli.other_names import OTHER_NAMES


@pytest.mark.parametrize(
    ("words", "here"),
    [
        ("sample x --outdir y", "--out"),
        ("sample --network x", "SOURCE"),
        (
            "sample x --num_inference_steps=4",
            "--nfe N, in network evaluations: Heun's method takes 2 N - 1 for N steps",
        ),
        ("sample x --S_churn 40", "--churn"),
        ("sample x --guidance-scale 2", "--guidance"),
        ("sample x --torch-dtype float16", "--dtype"),
        ("eval x --num 5000", "--n"),
        (
            "sample x --processes 2",
            "--seeds LIST, a part of them in a command for each GPU, with an --out of its own",
        ),
        ("train cosim x --outdir y", "--run-dir"),
        ("train cosim x --fp16", "--set training.precision=bf16"),
        ("train cosim x --batch 64", "--set training.batch=N"),
        ("train cosim x --report_to wandb", "--log-with"),
        ("data prepare x --dest y", "OUT.zip"),
        ("train cosim x --resume y", "--run-dir of the run: the same command resumes it"),
    ],
)
def test_an_option_of_another_program_is_translated(words: str, here: str):
    result = CliRunner().invoke(main, words.split())
    option = next(word for word in words.split() if word.startswith("--")).partition("=")[0]
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: No such option {option!r}: here it is {here}."


def every(command: click.Command, context: click.Context) -> Iterator[click.Command]:
    """The command, or those of a group."""
    if not isinstance(command, click.Group):
        yield command
        return
    for name in command.list_commands(context):
        found = command.get_command(context, name)
        assert found is not None
        yield from every(found, context)


def test_every_translation_is_into_an_option_that_a_command_has():
    """And none translates what every command with that option knows already."""
    known = [
        {name for parameter in command.params for name in (*parameter.opts, parameter.human_readable_name)}
        for command in every(main, click.Context(main))
    ]
    for other, offers in OTHER_NAMES.items():
        for offer in offers:
            word = offer.split()[0].rstrip(",")
            assert any(word in names and f"--{other}" not in names for names in known), (other, offer)
