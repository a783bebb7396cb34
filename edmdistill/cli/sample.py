"""`edmdistill sample`: images from a teacher or a generator."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edmdistill.cli.options import (
    compile_option,
    device_option,
    dtype_option,
    interruptible,
    option_group,
    say,
    say_unfinished,
    use_precision,
)
from edmdistill.cli.sampling_options import (
    DecodingOptions,
    SamplerOptions,
    churn_options,
    decoding_options,
    sampler_options,
)
from edmdistill.cli.types import BATCH, GAMMA, NFE, Count, FiniteFloat, OutputPath

if TYPE_CHECKING:
    from edmdistill.recipes.schema import CompileMode
    from edmdistill.sampling.heun import Churn
    from edmdistill.sampling.reference import ReferenceFiles
    from edmdistill.sampling.rejection import RejectionFiles


def _rejection(ratio: float | None, classifier: str | None) -> RejectionFiles | None:
    if (ratio is None) != (classifier is None):
        raise click.UsageError("--reject and --classifier go together: give both or neither.")
    if ratio is None or classifier is None:
        return None

    from edmdistill.sampling.rejection import RejectionFiles

    return RejectionFiles(ratio, classifier)


def _reference(reference: Path | None, feature_net: str | None, **others: Any) -> ReferenceFiles | None:
    if (reference is None) != (feature_net is None):
        raise click.UsageError("--reference and --feature-net go together: give both or neither.")
    given = {name: value for name, value in others.items() if value is not None}
    if reference is None or feature_net is None:
        if given:
            raise click.UsageError("--reference-weight, --correctors and --score are for --reference: leave them out.")
        return None

    from edmdistill.sampling.reference import ReferenceFiles

    return ReferenceFiles(image=reference, feature_net=feature_net, **given)


rejection_options = option_group(
    "rejection",
    _rejection,
    click.option(
        "--reject",
        "ratio",
        type=FiniteFloat(0, 1, max_open=True),
        help="Share of images to reject: the best of each class by --classifier are kept, as many as were requested.",
    ),
    click.option(
        "--classifier",
        metavar="FILE|digits|tiles",
        help="For --reject: TorchScript, or .safetensors like that of digits or tiles.",
    ),
)

reference_options = option_group(
    "reference",
    _reference,
    click.option(
        "--reference",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        metavar="FILE.png",
        help="Picture to start from and be pulled toward, by --feature-net.",
    ),
    click.option(
        "--feature-net",
        metavar="FILE|identity|gray|mask:FILE.png",
        help="For --reference: features to match: TorchScript, all pixels (strokes), luma (colorization), or the "
        "white of a mask (inpainting).",
    ),
    click.option(
        "--reference-weight", "weight", type=FiniteFloat(0, 1e6), help="For --reference: of the loss.  [default: 1]"
    ),
    click.option(
        "--correctors",
        type=Count(0, 10_000),
        help="For --reference: Langevin steps at each noise level.  [default: 10]",
    ),
    click.option(
        "--score",
        metavar="SOURCE",
        help="For --reference: the teacher, for a generator that does not have the score.",
    ),
)


@click.command("sample")
@click.argument("source")
@click.option("--out", type=OutputPath(), required=True, metavar="DIR|FILE.npz|FILE.png", help="Where to write.")
@click.option("--overwrite", is_flag=True, help="Replace other samples that are there.")
@click.option("--seeds", default="0-63", show_default=True, metavar="LIST", help="One image a seed, as in 0-63,100.")
@click.option("--nfe", type=NFE, help="Network evaluations.  [default: generator 2, or as trained; teacher 35 or 63]")
@click.option("--class", "words", multiple=True, metavar="NAME|ID", help="Class; several take turns.  [default: drawn]")
@click.option("--gamma", type=GAMMA, help="Generator: share of fresh noise, 0 to 1.  [default: the checkpoint's]")
@sampler_options
@churn_options
@rejection_options
@reference_options
@decoding_options
@click.option(
    "--layout",
    type=click.Choice(["edmdistill", "adm"]),
    default="edmdistill",
    show_default=True,
    help="Of an .npz: adm has arr_0 (and the classes as arr_1), for OpenAI's evaluator.",
)
@click.option("--batch", type=BATCH, default=64, show_default=True, help="Images at a time.")
@device_option
@dtype_option
@compile_option("off", "off")
def command(
    source: str,
    out: Path,
    overwrite: bool,
    seeds: str,
    nfe: int | None,
    words: tuple[str, ...],
    gamma: float | None,
    sampler: SamplerOptions,
    churn: Churn,
    rejection: RejectionFiles | None,
    reference: ReferenceFiles | None,
    decoding: DecodingOptions,
    layout: Literal["edmdistill", "adm"],
    batch: int,
    device: str | None,
    dtype: str | None,
    compile_mode: CompileMode,
) -> None:
    """Draw images from SOURCE: a teacher (official pickle, or a checkpoint of ours), a generator, or a run directory.

    A folder DIR gets a PNG for each seed and dataset.json with the classes; a grid is beside it, DIR-grid.png. A .png
    is the grid alone; an .npz holds images (uint8, [N,H,W,C]), seeds and labels. An image depends on its seed and class
    only, not on the batch. Latents are decoded by the VAE that the checkpoint names, if it is in the Hub's cache, or by
    that of --vae.

    Images are kept as they are drawn: after Ctrl-C, the same command goes on, with more --seeds too; a folder takes
    more seeds even when it is complete. Images that are not finite are left out and named, and the exit code is 1.
    On several GPUs, start a command for each, with a part of --seeds and an --out of its own.

    With --reject, more seeds than those of --seeds are drawn; the output says which were kept. With --reference, every
    image starts from the noised picture, and gamma must be below 1; its default is then 0.
    """
    from edmdistill.checkpoints.load import load_model
    from edmdistill.checkpoints.source import open_source
    from edmdistill.machine.compile import compile_for_sampling, require_compiler
    from edmdistill.machine.devices import named_dtype, pick_device
    from edmdistill.machine.launch import process_rank
    from edmdistill.progress import progress_bar
    from edmdistill.sampling.files import check_output, shown_count
    from edmdistill.sampling.job import SampleJob
    from edmdistill.sampling.labels import find_classes
    from edmdistill.sampling.seeds import parse_seeds

    numbers, where = parse_seeds(seeds), pick_device(device)
    rank, processes = process_rank()
    if processes > 1 and not rank:
        say(f"sample shares no work: if all {processes} processes run this command, each draws all of --seeds.")
    precision = named_dtype(dtype, where)
    require_compiler(compile_mode, where)
    check_output(out, latent=decoding.latents, layout=layout)
    checkpoint = open_source(source)
    model = load_model(checkpoint, where, precision, sampler.weights)
    say_unfinished(checkpoint, None if reference is None else reference.score)
    shown = shown_count(out, len(numbers))
    if shown < len(numbers):
        say(f"A grid shows the first {shown:,} images, so only these of the {len(numbers):,} are drawn.")
    cycle = find_classes(words, model.flow.label_dim, model.label_names)
    reject = None if rejection is None else rejection.load(model.flow, where)
    pull = None if reference is None else reference.load(model.flow, precision)
    spec = sampler.spec(model.flow, precision, nfe=nfe, gamma=gamma, churn=churn, reference=pull)
    use_precision(dtype, model, spec)
    compile_for_sampling(compile_mode, model, spec)
    decoder = decoding.decoder(model)
    job = SampleJob(
        model=model, spec=spec, seeds=numbers[:shown], cycle=cycle, rejection=reject, decoder=decoder, batch=batch
    )
    request = job.request(checkpoint, weights=sampler.weights, guide=sampler.guide, reference=reference)
    with closing(
        job.open_samples(out, request, source=checkpoint.exact, overwrite=overwrite, layout=layout)
    ) as samples:
        if samples.finished:
            say(f"{out} already holds these {samples.description}.")
        else:
            with interruptible(lambda: samples.progress), progress_bar(job.total) as bar:
                bar.update(samples.count - len(samples.missing))
                job.draw_into(samples, bar.update)
    samples.require_finite()
    say(f"{out}: {samples.description}")
