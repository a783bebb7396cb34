"""`edmdistill eval`: metrics of a network or of images, bound to a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from edmdistill.cli.measurements import MeasurementOptions, measure, measurement_options, plan_measurements, shared
from edmdistill.cli.options import list_option, option_group, say, say_unfinished, write_text
from edmdistill.cli.sampling_options import ONE_SAMPLER, SamplerOptions, churn_options
from edmdistill.cli.types import GAMMA, NFE, PROTOCOLS, Count, FiniteFloat, Name, OutputPath

if TYPE_CHECKING:
    from edmdistill.checkpoints.load import Dtype
    from edmdistill.evaluation.measurements import Measurements
    from edmdistill.evaluation.results import Result
    from edmdistill.networks.flow import FlowNetwork
    from edmdistill.sampling.heun import Churn
    from edmdistill.sampling.spec import SamplerSpec

NLL = "nll"
SAMPLING = "nfes", "gamma", "times", "guidance", "guide", "force_guidance", "solver", "seeds", "repeat", "vae", "dtype"
CHURN = "strength", "sigma_min", "sigma_max", "inflation"
NETWORK_ONLY = *SAMPLING, *CHURN, "compile_mode"
IMAGES_ONLY = *NETWORK_ONLY, "protocol", "weights", "save", "processes", "work"
LIKELIHOOD_ONLY = "split", "probes", "tolerance"
"""Options that only networks take; that only a measurement of images takes, and only one of likelihood."""


@dataclass(frozen=True)
class LikelihoodOptions:
    """The options of a likelihood, as they were typed."""

    split: str | None
    probes: int
    tolerance: float


likelihood_options = option_group(
    "likelihood",
    LikelihoodOptions,
    click.option("--split", metavar="NAME", help="nll: train, test or all of digits or tiles.  [default: test]"),
    click.option(
        "--probes",
        type=Count(1, 10_000),
        default=4,
        show_default=True,
        help="nll: random probes of the divergence.",
    ),
    click.option(
        "--tolerance",
        type=FiniteFloat(0, 1, min_open=True),
        default=1e-5,
        show_default=True,
        help="nll: of the ODE's solver, relative and absolute.",
    ),
)


@click.command("eval")
@click.argument("source")
@click.option("--protocol", type=Name(PROTOCOLS), help="How to measure.")
@list_option(
    "--nfe", "nfes", NFE, "1,2,4", "Network evaluations.  [default: generator 2, or as trained; teacher 35 or 63]"
)
@click.option("--gamma", type=GAMMA, help="Generator: share of fresh noise, 0 to 1.  [default: the checkpoint's]")
@option_group("sampler", SamplerOptions, *ONE_SAMPLER)
@churn_options
@measurement_options(
    "Network: seeds 0 to N - 1; images: the first N; nll: N of --ref.  [default: the protocol's; all]",
    "As in fid,fd_dinov2; or nll: bits per dimension of --ref.  [default: the protocol's]",
)
@likelihood_options
@click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON document.")
@click.option("--out", type=OutputPath(".json"), metavar="FILE.json", help="Also write it here.")
@click.pass_context
def command(
    context: click.Context,
    source: str,
    protocol: str | None,
    nfes: list[int] | None,
    gamma: float | None,
    sampler: SamplerOptions,
    churn: Churn,
    options: MeasurementOptions,
    likelihood: LikelihoodOptions,
    as_json: bool,
    out: Path | None,
) -> None:
    """Measure SOURCE against real images: a checkpoint, a run directory, an official pickle, or images in a folder, zip
    or .npz.

    A network is sampled once for each of --nfe, image i with seed i, and each image is measured by all metrics. After
    Ctrl-C or a kill the same command goes on, on another number of processes too. With --metrics nll nothing is
    sampled: the likelihood of --ref under the network is measured, in bits per dimension.
    """
    nll = options.metrics == [NLL]
    kind = f"--metrics {NLL}" if nll else "a measurement of images"
    _refuse(context, IMAGES_ONLY if nll else LIKELIHOOD_ONLY, f"does not go with {kind}")
    if not nll and protocol is None:
        raise click.UsageError(f"Missing option '--protocol'. Choose one of {', '.join(PROTOCOLS)}.")

    from edmdistill.evaluation.images import is_images
    from edmdistill.evaluation.results import results_json, results_table
    from edmdistill.sampling.files import unfinished_samples

    if is_images(source) and not nll:
        _refuse(context, NETWORK_ONLY, f"says how a network is sampled, but {source} holds images, which exist")
        if sentence := unfinished_samples(Path(source)):
            say(sentence)
    folder = options.results_folder(source)

    def specs(flow: FlowNetwork, dtype: Dtype) -> list[SamplerSpec]:
        spec = sampler.spec(flow, dtype, gamma=gamma, churn=churn)
        return [replace(spec, nfe=nfe) for nfe in nfes or (None,)]

    def show(results: Sequence[Result]) -> None:
        document = results_json(results)
        if out is not None:
            write_text(out, document)
        click.echo(document if as_json else results_table(results))

    with shared(options) as processes:
        measurements = (
            _plan_likelihood(source, options, likelihood)
            if protocol is None
            else plan_measurements(source, protocol, options, specs, processes)
        )
        measure(measurements, folder, show)


def _refuse(context: click.Context, names: tuple[str, ...], why: str) -> None:
    """Raises UsageError if an option was given that this measurement does not take."""
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) == ParameterSource.COMMANDLINE
        if given and parameter.name in names:
            raise click.UsageError(f"{parameter.opts[0]} {why}: leave it out.")


def _plan_likelihood(source: str, options: MeasurementOptions, likelihood: LikelihoodOptions) -> Measurements:
    if options.ref is None:
        raise click.UsageError("--metrics nll measures the likelihood of images: name them with --ref.")

    from edmdistill.checkpoints.layout import is_state
    from edmdistill.checkpoints.load import load_model
    from edmdistill.checkpoints.source import open_source
    from edmdistill.data.datasets import open_dataset
    from edmdistill.embedded import EMBEDDED
    from edmdistill.evaluation.images import is_images
    from edmdistill.evaluation.measurements import measure_likelihood
    from edmdistill.machine.devices import pick_device

    if is_images(source):
        raise click.UsageError(f"likelihoods are for networks, but {source} is images: name a network.")
    data = open_dataset(options.ref, split=likelihood.split or ("test" if options.ref in EMBEDDED else "train"))
    checkpoint = open_source(source)
    model = load_model(checkpoint, pick_device(options.device))
    say_unfinished(checkpoint)
    return measure_likelihood(
        model,
        data,
        count=options.count,
        probes=likelihood.probes,
        tolerance=likelihood.tolerance,
        source=checkpoint.exact,
        raw=is_state(checkpoint.path),
    )
