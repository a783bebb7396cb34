"""Parts that measuring commands share: their options and processes, and how results are saved and printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edmdistill.cli.options import (
    compile_option,
    device_option,
    dtype_option,
    errors_once,
    option_group,
    processes_option,
    say,
    say_unfinished,
    use_precision,
)
from edmdistill.cli.types import CommaList, Count, OutputPath

if TYPE_CHECKING:
    import torch

    from edmdistill.checkpoints.load import Dtype
    from edmdistill.evaluation.measurements import Measurements
    from edmdistill.evaluation.results import Result
    from edmdistill.evaluation.shards import Processes, Work
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.recipes.schema import CompileMode
    from edmdistill.sampling.spec import SamplerSpec

    MakeSpecs = Callable[[FlowNetwork, Dtype], Sequence[SamplerSpec]]


class WeightsOf(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases of click alone
    """`ema` or `raw`, of a run; or NAME=FILE, of a feature space."""

    name = "weights"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name, equals, file = str(value).partition("=")
        if value not in ("ema", "raw") and not (equals and name and file):
            self.fail(f"{str(value)!r} is neither ema, raw nor NAME=FILE, as in inception=inception.pt.", param, ctx)
        return str(value)


def _require_different(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the values of --weights.  Raises: BadParameter: two of them are of one network."""
    names = [text.partition("=")[0] if "=" in text else "a run (ema or raw)" for text in given]
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(f"the weights of {name} are given twice: leave out one of them.", ctx, param)
    return given


SHARING = (
    device_option,
    processes_option,
    click.option(
        "--work",
        type=OutputPath(filled=True),
        metavar="DIR",
        help="Where what is measured is kept until the end, for the same command to go on with.  "
        "[default: in the user's cache]",
    ),
)
"""The options of a command that several processes share, and that goes on after a stop."""


@dataclass(frozen=True, kw_only=True)
class SharingOptions:
    """The options of SHARING, as they were typed."""

    device: str | None
    processes: int | None
    work: Path | None

    def open_work(self) -> Work:
        """Returns the work in the folder of --work, or in the user's cache.

        Raises: CheckpointError: the cache cannot be written.
        """
        from edmdistill.checkpoints.download import in_writable_folder
        from edmdistill.evaluation.shards import Work, evaluations_folder

        return Work(self.work or in_writable_folder(evaluations_folder() / "any").parent)


sharing_options = option_group("sharing", SharingOptions, *SHARING)


@dataclass(frozen=True, kw_only=True)
class MeasurementOptions(SharingOptions):
    """The options of a measurement, as they were typed."""

    ref: str | None
    metrics: list[str] | None
    count: int | None
    seeds: str | None
    repeat: int
    weights: tuple[str, ...]
    vae: str | None
    save: bool
    dtype: str | None
    compile_mode: CompileMode

    @property
    def run_weights(self) -> Literal["ema", "raw"]:
        """Which weights of a run are measured."""
        return "raw" if "raw" in self.weights else "ema"

    def results_folder(self, source: str) -> Path | None:
        """Returns where --save keeps the results of a source; None: it was not given.

        Raises: UsageError: they are of raw weights.  EdmDistillError: they cannot be kept there.
        """
        from edmdistill.evaluation.results import find_results_folder

        if not self.save:
            return None
        if self.run_weights == "raw":
            raise click.UsageError("--save keeps results with a run's averaged weights, not its raw ones: use --out.")
        return find_results_folder(source)

    def of_every_source(self, device: torch.device, processes: Processes) -> dict[str, Any]:
        """Returns the arguments of `evaluate` for networks and images alike."""
        pairs = (text.partition("=") for text in self.weights if "=" in text)
        return {
            "metrics": self.metrics,
            "weights": {name: file for name, _, file in pairs},
            "device": device,
            "work": self.open_work(),
            "processes": processes,
        }


def measurement_options(
    count_help: str = "", metrics_help: str = "", *, raw: bool = True, **fixed: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that adds the options of a measurement; the command gets them as one `options`.

    Args:
        count_help, metrics_help: of --n and --metrics.
        raw: whether the command measures a run's raw weights.
        fixed: the values of fields that the command has no options for.
    """
    options: dict[str, Callable[[Callable[..., None]], Callable[..., None]]] = {
        "ref": click.option(
            "--ref",
            metavar="DATA",
            help="Real images: a zip, a folder, an .npz, digits or tiles; or statistics of them.  "
            "[default: the protocol's own]",
        ),
        "metrics": click.option("--metrics", type=CommaList(), metavar="LIST", help=metrics_help),
        "count": click.option("--n", "count", type=Count(2, 2_000_000), help=count_help),
        "seeds": click.option("--seeds", metavar="LIST", help="Network: these seeds, as in 5000-9999."),
        "repeat": click.option(
            "--repeat",
            type=Count(1, 100),
            default=1,
            show_default=True,
            help="Network: measure so many times, with the seeds that follow; gives mean, minimum and deviation.",
        ),
        "weights": click.option(
            "--weights",
            type=WeightsOf(),
            callback=_require_different,
            multiple=True,
            metavar="ema|raw|NAME=FILE" if raw else "NAME=FILE",
            help=("Of a run: its average, or its newest raw weights. NAME=FILE: of" if raw else "Of")
            + " a feature space, as in inception=inception.pt; may be repeated.  [default: "
            + ("ema, and the official files]" if raw else "the official files]"),
        ),
        "vae": click.option("--vae", metavar="DIR|ID", help="VAE of a latent network.  [default: the checkpoint's]"),
        "save": click.option(
            "--save",
            is_flag=True,
            help="Also save it with the checkpoint or run, where report and push-to-hub find it.",
        ),
        "dtype": dtype_option,
        "compile_mode": compile_option("off", "off"),
    }
    asked = (option for name, option in options.items() if name not in fixed)
    return option_group("options", partial(MeasurementOptions, **fixed), *asked, *SHARING)


@contextmanager
def shared(options: SharingOptions) -> Iterator[Processes]:
    """Yields the processes that share a command, this one among them; with --processes, starts them and exits.

    Of several, the main one alone prints; errors that all of them meet are printed once.
    """
    from edmdistill.evaluation.shards import ONE_PROCESS
    from edmdistill.machine.launch import init_from_environment, launch, process_rank, without_processes

    init_from_environment()
    count = options.processes
    if count is not None and count > 1:
        sys.exit(launch(without_processes(sys.argv[1:]), count, device=options.device, on_message=say))
    rank, world_size = process_rank()
    if world_size == 1:
        yield ONE_PROCESS
        return

    from edmdistill.machine.processes import ProcessGroup
    from edmdistill.progress import set_quiet

    if rank:
        set_quiet(True)
    group = ProcessGroup()
    try:
        with errors_once():
            yield group
    finally:
        group.close()


def plan_measurements(
    source: str, protocol: str, options: MeasurementOptions, specs: MakeSpecs, processes: Processes
) -> Measurements:
    """Loads a source and its reference, and returns the measurements of it.

    Args:
        specs: returns the samplers of a network that is loaded in this dtype.
    """
    if options.count and options.seeds is not None:
        raise click.UsageError("--n N means the seeds 0 to N - 1, so it cannot be combined with --seeds.")

    from edmdistill.checkpoints.layout import is_state
    from edmdistill.checkpoints.load import load_model, weights_digest
    from edmdistill.checkpoints.source import open_source
    from edmdistill.evaluation.images import is_images, open_images
    from edmdistill.evaluation.measurements import measure_images, measure_network
    from edmdistill.evaluation.protocol import get_protocol, open_reference
    from edmdistill.machine.compile import compile_for_sampling, require_compiler
    from edmdistill.machine.devices import named_dtype, process_device
    from edmdistill.sampling.decode import open_decoder
    from edmdistill.sampling.seeds import parse_seeds

    standard, device = get_protocol(protocol), process_device(options.device)
    dtype = named_dtype(options.dtype, device)
    require_compiler(options.compile_mode, device)
    data, common = open_reference(options.ref, standard), options.of_every_source(device, processes)
    _say_all(getattr(data, "notes", ()))
    if is_images(source):
        if {"ema", "raw"} & {*options.weights}:
            raise click.UsageError(f"--weights ema or raw is of a run, and {source} holds images: leave it out.")
        images = open_images(source, getattr(data, "label_dim", 0))
        _say_all(images.notes)
        return measure_images(images, data, standard, source, count=options.count, **common)
    seeds: Sequence[int] | None = range(options.count) if options.count else None
    seeds = seeds if options.seeds is None else parse_seeds(options.seeds)
    checkpoint = open_source(source)
    model = load_model(checkpoint, device, dtype, options.run_weights)
    say_unfinished(checkpoint)
    decode = open_decoder(model.encoder, options.vae, device)
    _say_all(filter(None, [getattr(decode, "note", None)]))
    samplers = specs(model.flow, dtype)
    use_precision(options.dtype, model, *samplers)
    compile_for_sampling(options.compile_mode, model, *samplers)
    return measure_network(
        model,
        data,
        standard,
        samplers=samplers,
        seeds=seeds,
        repeat=options.repeat,
        decode=decode,
        source=checkpoint.exact,
        source_sha256=weights_digest(checkpoint, model, options.run_weights),
        raw=options.run_weights == "raw" or is_state(checkpoint.path),
        **common,
    )


def _say_all(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        say(sentence)


def measure(measurements: Measurements, folder: Path | None, show: Callable[[Sequence[Result]], None]) -> None:
    """Makes measurements with a progress bar, and shows the results that there are, also after Ctrl-C.

    Args:
        folder: where results are saved, or None.
        show: prints and writes them.
    Raises: NotFiniteError: a measurement has no finite result; the others are shown.
    """
    from edmdistill.errors import Interrupted, NotFiniteError
    from edmdistill.evaluation.measurements import run_measurements
    from edmdistill.progress import progress_bar

    main, work = measurements.processes.rank == 0, measurements.work
    try:
        with progress_bar(measurements.images) as bar:
            results, failures, interrupted = run_measurements(measurements, folder, bar.update)
        if results and main:
            show(results)
        if work is not None and not interrupted:
            work.remove()
    finally:
        if work is not None:
            work.close()
    if interrupted:
        saved = " and saved" if folder is not None else ""
        verb = "is" if len(results) == 1 else "are"
        count = f"{len(results)} of {len(measurements.tasks)} measurements {verb} done{saved}"
        rest = "the measurement in progress is lost"
        if work is not None:
            rest = f"the same command goes on with what is kept in {work.root}"
        raise Interrupted(f"{count if results else 'no measurement is done yet'}; {rest}.")
    if failures:
        raise NotFiniteError("; ".join(failures))
