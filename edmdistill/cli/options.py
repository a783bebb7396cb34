"""The types and sentences that commands share: each checks what a user typed once, before any work begins."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edmdistill.errors import EdmDistillError, PeerFailed, did_you_mean

if TYPE_CHECKING:
    import torch

    from edmdistill.checkpoints.generator import Generator
    from edmdistill.checkpoints.source import Source
    from edmdistill.networks.flow import Denoiser, FlowNetwork
    from edmdistill.sampling.decode import Decoder
    from edmdistill.sampling.heun import Churn
    from edmdistill.sampling.spec import SamplerSpec

MAX_NFE, MAX_BATCH = 10_000, 65_536
MAX_GUIDANCE = 1000.0
PROTOCOLS = "digits", "pixels", "edm", "edm2", "adm", "cosim"
FEATURES = "inception", "dinov2", "inception-pytorch-fid", "dinov2-dgm", "digits", "pixels"
SOLVERS = "heun", "ddim", "dpm-solver-2s", "dpm-solver++2m"
"""The keys of the library's tables, which are not imported for `--help`; a test compares them."""


class FiniteFloat(click.FloatRange):
    """A number in a range; click.FloatRange lets nan and infinity pass.

    Args:
        infinite: infinity is allowed, nan is not.
    """

    def __init__(
        self,
        min: float | None = None,
        max: float | None = None,
        min_open: bool = False,
        max_open: bool = False,
        *,
        infinite: bool = False,
    ) -> None:
        super().__init__(min, max, min_open, max_open)
        self.infinite = infinite

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]  # click's stub asks for a float
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Name(click.Choice[str]):
    """One of some names; another one is answered by the nearest."""

    def get_invalid_choice_message(self, value: object, ctx: click.Context | None) -> str:
        return f"{str(value)!r} is not known; {did_you_mean(str(value), self.choices)}"


class NumberList(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click alone
    """Numbers with commas between them, as in 1,2,4; each is checked by `item`.

    Args:
        item: the type of one number, such as click.IntRange or FiniteFloat.
        example: shown where the text is no list.
    """

    name = "list"

    def __init__(self, item: click.ParamType[Any], example: str) -> None:
        self.item, self.example = item, example

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if isinstance(value, list):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        try:
            for part in parts:
                float(part)
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as {self.example}.", param, ctx)
        return [self.item.convert(part, param, ctx) for part in parts]


class NameList(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click alone
    """Some of a set of names, with commas between them, each once."""

    name = "list"

    def __init__(self, choices: Sequence[str]) -> None:
        self.item = Name(choices)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if isinstance(value, list):
            return value
        names = [self.item.convert(part.strip(), param, ctx) for part in str(value).split(",")]
        return list(dict.fromkeys(names))


class NamedFile(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click alone
    """A file or folder for one of a set of names, as in inception=FILE; the command gets (name, path)."""

    name = "file"

    def __init__(self, choices: Sequence[str]) -> None:
        self.item = Name(choices)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        if isinstance(value, tuple):
            return value
        name, equals, path = str(value).partition("=")
        if not (equals and path):
            self.fail(f"{value!r} does not have the form NAME=FILE.", param, ctx)
        return self.item.convert(name, param, ctx), Path(path).expanduser()


class OutputPath(click.Path):
    """A file or folder to write. Refuses what can never be written, before any work begins.

    That is "", a NUL, a name too long, the root folder, a device or pipe, a place where nothing may be written, and a
    suffix other than those known.

    Args:
        suffixes: of the file, in lower case; none = any. Case is ignored.
    """

    NAME_BYTES, PATH_BYTES = 255, 4096

    def __init__(self, *suffixes: str) -> None:
        super().__init__(path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        text = str(value)
        if not text.strip():
            self.fail("the path is empty; name a file or folder.", param, ctx)
        if "\0" in text:
            self.fail("the path holds a NUL character; leave it out.", param, ctx)
        try:
            path = Path(text).expanduser()
            whole = path.absolute()
        except RuntimeError:
            self.fail(f"{text} names a user who does not exist on this machine; write the path in full.", param, ctx)
        except FileNotFoundError:
            self.fail("the working directory no longer exists; change to another one.", param, ctx)
        if whole == Path(whole.anchor):
            self.fail(f"{text} is the root folder; name a folder inside it.", param, ctx)
        if max(len(os.fsencode(part)) for part in whole.parts) > self.NAME_BYTES or len(bytes(whole)) > self.PATH_BYTES:
            self.fail(f"the name is longer than the {self.NAME_BYTES} bytes a file name may have.", param, ctx)
        if self.suffixes and path.suffix.lower() not in self.suffixes:
            self.fail(f"{text} must end in {' or '.join(self.suffixes)}: no other format is written here.", param, ctx)
        try:
            if whole.exists() and not whole.is_file() and not whole.is_dir():
                self.fail(f"{text} is a device or a pipe; name a file or folder.", param, ctx)
            if self.suffixes and whole.is_dir():
                self.fail(f"{text} is a folder, and a file is to be written; choose another name.", param, ctx)
            there = next(folder for folder in whole.parents if folder.exists())
            writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        except OSError as error:
            self.fail(f"{text} cannot be reached ({error.strerror}); choose another place.", param, ctx)
        if not writable:
            self.fail(f"{text} cannot be written, for {there} is not a folder you may write to.", param, ctx)
        return path


NFE = click.IntRange(1, MAX_NFE)
GAMMA = FiniteFloat(0, 1)
BATCH = click.IntRange(1, MAX_BATCH)


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


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """What `sampler_options` adds to a command, as it was typed."""

    times: str | None
    guidance: float | None
    guide: str | None
    force_guidance: bool
    solver: str | None
    weights: Literal["ema", "raw"] = "ema"

    def arguments(self, flow: FlowNetwork, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Returns the fields of the SamplerSpec that they stand for; a guide is loaded.

        Args:
            flow: the network to sample.
            device, dtype: of the guide.
        """
        from edmdistill.checkpoints.load import load_denoiser
        from edmdistill.sampling.times import parse_times

        levels = {"sigma_data": flow.sigma_data, "sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
        return {
            "times": None if self.times is None else parse_times(self.times, **levels),
            "guidance": self.guidance,
            "guide": None if self.guide is None else load_denoiser(self.guide, device, dtype),
            "force_guidance": self.force_guidance,
            "solver": self.solver,
        }

    def spec(
        self, flow: FlowNetwork, device: torch.device, dtype: torch.dtype | None = None, **others: Any
    ) -> SamplerSpec:
        """Returns the spec that they stand for; a guide is loaded.

        Args:
            flow: the network to sample.
            device, dtype: of the guide.
            others: fields of the spec that have other options.
        """
        from edmdistill.sampling.spec import SamplerSpec

        return SamplerSpec(**self.arguments(flow, device, dtype), **others)


@dataclass(frozen=True, kw_only=True)
class SamplerGrid:
    """What `sampler_grid_options` adds to a command, as it was typed: each combination is a sampler."""

    times: tuple[str, ...]
    guidance: list[float] | None
    guide: str | None
    force_guidance: bool
    solver: str | None

    def specs(
        self,
        flow: FlowNetwork,
        device: torch.device,
        dtype: torch.dtype | None,
        nfes: Sequence[int | None],
        gammas: Sequence[float | None],
    ) -> list[SamplerSpec]:
        """Returns the specs that they stand for, NFE running fastest; a guide is loaded, and is of no use at weight 1.

        Args: as SamplerOptions.spec's.
        """
        from edmdistill.checkpoints.load import load_denoiser
        from edmdistill.sampling.spec import SamplerSpec
        from edmdistill.sampling.times import parse_times

        levels = {"sigma_data": flow.sigma_data, "sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
        guide = None if self.guide is None else load_denoiser(self.guide, device, dtype)
        guided: dict[str, Any] = {"guide": guide, "force_guidance": self.force_guidance}
        return [
            SamplerSpec(
                nfe=nfe,
                gamma=gamma,
                times=None if times is None else parse_times(times, **levels),
                guidance=weight,
                solver=self.solver,
                **(guided if weight not in (None, 1) else {}),
            )
            for times in self.times or (None,)
            for weight in self.guidance or (None,)
            for gamma in gammas
            for nfe in nfes
        ]


TEACHER_OPTIONS = (
    click.option(
        "--guide", metavar="SOURCE", help="Teacher: network to guide away from.  [default: itself, without classes]"
    ),
    click.option(
        "--force-guidance",
        is_flag=True,
        help="Let a teacher guide itself that was never trained without its classes.",
    ),
    click.option("--solver", type=Name(SOLVERS), help="Teacher, or CTM's generator.  [default: heun]"),
)
ONE_SAMPLER = (
    click.option(
        "--t", "times", metavar="LIST", help="Generator: noise levels as in 80,2.5 or radians as in 1.56rad,1.1rad."
    ),
    click.option(
        "--guidance",
        type=FiniteFloat(0, MAX_GUIDANCE),
        metavar="W",
        help="Guidance weight: 1 = none, 0 = the guide alone.  [default: 1, or the lower end of a generator's range]",
    ),
    *TEACHER_OPTIONS,
)
sampler_grid_options = option_group(
    "sampler",
    SamplerGrid,
    click.option(
        "--t", "times", multiple=True, metavar="LIST", help="Generator: noise levels, as of sample; may be repeated."
    ),
    click.option(
        "--guidance",
        type=NumberList(FiniteFloat(0, MAX_GUIDANCE), "1,1.2,1.4"),
        metavar="LIST",
        help="Guidance weights, as in 1,1.2,1.4.  [default: 1, or the lower end of a generator's range]",
    ),
    *TEACHER_OPTIONS,
)
sampler_options = option_group(
    "sampler",
    SamplerOptions,
    *ONE_SAMPLER,
    click.option(
        "--weights",
        type=click.Choice(["ema", "raw"]),
        default="ema",
        show_default=True,
        help="Weights of a run: the average that it publishes, or the raw weights of its newest state.",
    ),
)
"""Adds the options that say how to sample a network; the command gets them as one `sampler`, SamplerOptions."""


def _churn(**values: float) -> Churn:
    from edmdistill.sampling.heun import Churn

    return Churn(**values)


churn_options = option_group(
    "churn",
    _churn,
    click.option(
        "--churn", "strength", type=FiniteFloat(0, 1e4), default=0.0, show_default=True, help="Teacher: S_churn."
    ),
    click.option(
        "--churn-min", "sigma_min", type=FiniteFloat(0, 1e6), default=0.0, show_default=True, help="Teacher: S_min."
    ),
    click.option(
        "--churn-max",
        "sigma_max",
        type=FiniteFloat(0, infinite=True),
        default=float("inf"),
        show_default=True,
        help="Teacher: S_max.",
    ),
    click.option(
        "--churn-noise", "inflation", type=FiniteFloat(0, 10), default=1.0, show_default=True, help="Teacher: S_noise."
    ),
)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """What `decoding_options` adds to a command, as it was typed."""

    vae: str | None
    latents: bool

    def decoder(self, model: Generator | Denoiser) -> Decoder | None:
        """Returns what turns the model's images into pictures; None where latents are kept.

        Raises: CheckpointError: the VAE is not here, or does not fit.  EdmDistillError: options that do nothing.
        """
        from edmdistill.sampling.decode import LatentDecoder, model_decoder
        from edmdistill.sampling.generate import is_latent

        if self.latents and not is_latent(model):
            raise EdmDistillError("--latents has no effect because the network works on pixels: leave it out")
        decoder = None if self.latents else model_decoder(model, self.vae)
        if isinstance(decoder, LatentDecoder) and decoder.note is not None:
            say(decoder.note)
        return decoder


def _decoding(vae: str | None, latents: bool) -> DecodingOptions:
    if latents and vae is not None:
        raise click.UsageError("--latents keeps latents as they are, and --vae decodes them: leave one of them out.")
    return DecodingOptions(vae=vae, latents=latents)


decoding_options = option_group(
    "decoding",
    _decoding,
    click.option(
        "--vae", metavar="DIR|ID", help="Latents: the VAE that decodes them.  [default: the checkpoint's, if cached]"
    ),
    click.option("--latents", is_flag=True, help="Latents: keep them as they are, in an .npz."),
)
"""Adds the options on a VAE's latents; the command gets them as one `decoding`, DecodingOptions."""


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """At Ctrl-C, ends the command with 130 and one line on stderr: what is kept, and what is lost."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted: {kept()}", err=True)
        sys.exit(130)


@contextmanager
def errors_once() -> Iterator[None]:
    """Lets the main process alone report an error that every process of a command meets."""
    try:
        yield
    except EdmDistillError as error:
        own = int(os.environ.get("RANK", 0)) == 0 or hasattr(error, "__notes__")  # notes are on this process alone
        raise (error if own else PeerFailed("the main process says why")) from error


def say_unfinished(source: str | Source) -> None:
    """Says so where a checkpoint or run that is about to be used was not trained to its end."""
    from edmdistill.checkpoints.config import unfinished
    from edmdistill.checkpoints.load import find_config

    config = find_config(source)
    if config is not None and (sentence := unfinished(config)):
        say(sentence)


def say(sentence: str) -> None:
    """Prints a line for the user on stderr, above a progress bar if there is one; nothing under `--quiet`."""
    from edmdistill.progress import write

    write(sentence)
