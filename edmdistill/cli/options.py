"""Parts that commands share: groups of options, and how they report, write, stop and fail."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from edmdistill.cli.types import COMPILE, SECOND_MOMENTS, Count, Name, NumberList, OutputPath
from edmdistill.errors import EdmDistillError, Interrupted, PeerFailed

if TYPE_CHECKING:
    from pathlib import Path

    from edmdistill.checkpoints.generator import Generator
    from edmdistill.checkpoints.source import Source
    from edmdistill.networks.flow import Denoiser
    from edmdistill.sampling.spec import SamplerSpec


def list_option(
    flag: str, name: str, item: click.ParamType[Any], example: str, help: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds an option for a list of numbers.

    Args:
        item, example: see NumberList; the help shows the example as the value.
    """
    return click.option(flag, name, metavar=example, type=NumberList(item, example), help=help)


def option_group(
    argument: str, make: Callable[..., object], *options: Callable[[Callable[..., None]], Callable[..., None]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds options to a command, which gets their values as one argument: make(**values)."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def wrapped(**values: Any) -> None:
            grouped = make(**{name: values.pop(name) for name in names})
            command(**{argument: grouped}, **values)

        others = len(getattr(command, "__click_params__", ()))
        for option in reversed(options):
            wrapped = option(wrapped)
        names = [parameter.name for parameter in wrapped.__click_params__[others:]]  # type: ignore[attr-defined]
        return wrapped

    return decorate


def compile_option(default: str | None, shown: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds --compile, the argument `compile_mode`.  shown: the default as the help says it."""
    return click.option(
        "--compile",
        "compile_mode",
        type=Name(COMPILE),
        default=default,
        help="Let torch.compile fuse the networks' operations, or make CUDA graphs of them too: minutes of compiling, "
        f"for speed that no GPU has shown yet.  [default: {shown}]",
    )


second_moment_option = click.option(
    "--second-moment",
    type=click.Choice(SECOND_MOMENTS),
    default="fp32",
    show_default=True,
    help="Adam's; bf16 halves it, by rounding at random: a step's length is off by about 1% at betas of .99.",
)
EXACT = "float32", "float64"
device_option = click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "tf32", "float64", "bfloat16", "float16"]),
    help="Of the network.  [default: on a GPU float16 if its official code has it, else tf32; on a CPU float32]",
)
sets_option = click.option(
    "--set", "sets", multiple=True, metavar="TABLE.KEY=VALUE", help="Change the recipe; may be repeated."
)
split_option = click.option(
    "--split", metavar="NAME", default="train", show_default=True, help="Split of digits or tiles: train, test or all."
)
processes_option = click.option(
    "--processes", type=Count(min=1), help="Start so many on this machine, one for each GPU."
)
PLOTS = ".svg", ".html", ".png", ".pdf"
plot_option = click.option(
    "--plot",
    type=OutputPath(*PLOTS),
    metavar="FILE.svg|.html|.png|.pdf",
    help="Draw the first metric over NFE, a curve for each source and setting; .html has the table too, and .png and "
    ".pdf take matplotlib.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """A context that Ctrl-C ends with a sentence on what is kept, and what is lost."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted(kept()) from interrupt


@contextmanager
def errors_once() -> Iterator[None]:
    """Lets the main process alone report an error that every process of a command meets."""
    try:
        yield
    except EdmDistillError as error:
        # An error with notes is on this process alone.
        is_reporter = int(os.environ.get("RANK", 0)) == 0 or hasattr(error, "__notes__")
        raise (error if is_reporter else PeerFailed("the main process says why")) from error


def say_unfinished(*sources: str | Source | None) -> None:
    """Says which of the checkpoints and runs that are about to be used were not trained to their end."""
    from edmdistill.checkpoints.config import unfinished
    from edmdistill.checkpoints.load import find_config
    from edmdistill.errors import without_secrets

    for source in dict.fromkeys(sources):
        config = None if source is None else find_config(source)
        if config is not None and (sentence := unfinished(config, without_secrets(str(source)))):
            say(sentence)


def use_precision(dtype: str | None, model: Generator | Denoiser, *specs: SamplerSpec) -> None:
    """Allows TF32 on CUDA or not, as `--dtype` says, and says so where a precision spoils the images of a network.

    float32 and float64 are exact. By default, so are networks that predict the noise, which TF32 would spoil, and
    whatever computes beside one, as TF32 is allowed in a whole process or not. Beside half precision, TF32 is for what
    stays float32, such as a VAE.
    """
    from edmdistill.kernels.linear import allow_tf32
    from edmdistill.networks.preconditioning import NoisePrediction
    from edmdistill.sampling.build import rounding_warning

    if model.flow.device.type == "cuda":
        networks = [model, *(network for spec in specs for network in spec.companions)]
        predict_noise = any(isinstance(each.flow.preconditioning, NoisePrediction) for each in networks)
        allow_tf32(not (predict_noise if dtype is None else dtype in EXACT))
    for sentence in dict.fromkeys(rounding_warning(model, spec) for spec in specs):
        if sentence is not None:
            say(sentence)


def say(sentence: str) -> None:
    """Prints a line for the user on stderr, above a progress bar if there is one; nothing under `--quiet`."""
    from edmdistill.progress import write

    write(sentence)


def print_json(**fields: object) -> None:
    """Prints one JSON document with these keys."""
    click.echo(json.dumps({"schema_version": 1} | fields, indent=2))


def write_text(file: Path, text: str) -> None:
    """Writes a document as a file, whole or not at all."""
    from edmdistill.atomic import atomic_write

    with atomic_write(file) as new:
        new.write_text(text + "\n", encoding="utf-8")
