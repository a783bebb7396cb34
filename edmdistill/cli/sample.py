"""`edmdistill sample`: images from a teacher or a generator."""

from pathlib import Path
from typing import Any

import click

from edmdistill.cli.options import (
    BATCH,
    GAMMA,
    NFE,
    FiniteFloat,
    OutputPath,
    SamplerOptions,
    interruptible,
    sampler_options,
    say,
    say_unfinished,
)


@click.command("sample")
@click.argument("source")
@click.option("--out", type=OutputPath(), required=True, metavar="DIR|FILE.npz|FILE.png", help="Where to.")
@click.option("--overwrite", is_flag=True, help="Replace other samples that are there.")
@click.option("--seeds", default="0-63", show_default=True, metavar="LIST", help="One image a seed, as in 0-63,100.")
@click.option("--nfe", type=NFE, help="Network evaluations.  [default: generator 2, teacher 35 or 63]")
@click.option("--class", "words", multiple=True, metavar="NAME|ID", help="Class; several take turns.  [default: drawn]")
@click.option("--gamma", type=GAMMA, help="Generator: share of fresh noise, 0 to 1.  [default: the checkpoint's]")
@sampler_options
@click.option("--churn", type=FiniteFloat(0, 1e4), default=0.0, show_default=True, help="Teacher: S_churn.")
@click.option("--churn-min", type=FiniteFloat(0, 1e6), default=0.0, show_default=True, help="Teacher: S_min.")
@click.option(
    "--churn-max", type=FiniteFloat(0, infinite=True), default=float("inf"), show_default=True, help="Teacher: S_max."
)
@click.option("--churn-noise", type=FiniteFloat(0, 10), default=1.0, show_default=True, help="Teacher: S_noise.")
@click.option(
    "--reject",
    "ratio",
    type=FiniteFloat(0, 1, max_open=True),
    help="Share of images to throw away: of each class the best by --classifier stay, as many as were asked for.",
)
@click.option("--classifier", metavar="FILE|digits", help="For --reject: TorchScript, or .safetensors like digits'.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    metavar="FILE.png",
    help="Picture to begin from and to be pulled to, by --feature-net.",
)
@click.option(
    "--feature-net",
    metavar="FILE|identity|gray|mask:FILE.png",
    help="For --reference: what is to be alike: TorchScript, all (strokes), luma (colourisation), or the white of a "
    "mask (inpainting).",
)
@click.option("--reference-weight", type=FiniteFloat(0, 1e6), help="For --reference: of the loss.  [default: 1]")
@click.option("--correctors", type=click.IntRange(0, 10_000), help="For --reference: at a noise level.  [default: 10]")
@click.option("--score", metavar="SOURCE", help="For --reference: the teacher, for a generator that knows no score.")
@click.option("--batch", type=BATCH, default=64, show_default=True, help="Images at a time.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
@click.option("--dtype", type=click.Choice(["float32", "float64", "bfloat16", "float16"]), help="Of the network.")
def command(
    source: str,
    out: Path,
    overwrite: bool,
    seeds: str,
    nfe: int | None,
    words: tuple[str, ...],
    gamma: float | None,
    sampler: SamplerOptions,
    churn: float,
    churn_min: float,
    churn_max: float,
    churn_noise: float,
    ratio: float | None,
    classifier: str | None,
    reference: Path | None,
    feature_net: str | None,
    reference_weight: float | None,
    correctors: int | None,
    score: str | None,
    batch: int,
    device: str | None,
    dtype: str | None,
) -> None:
    """Draw images from SOURCE: a teacher (official pickle, or a checkpoint of ours), a generator, or a run directory.

    A folder gets a PNG for each seed, a grid, and dataset.json with the classes; a .png is the grid alone; an .npz
    holds images (uint8, [N,H,W,C]), seeds and labels. An image depends on its seed and class only, not on the batch.
    A network on VAE latents writes them to an .npz, undecoded.

    Images are kept as they are drawn: after Ctrl-C, the same command goes on. Images that are not finite are left out
    and named, and the exit code is 1.

    With --reject, further seeds than those of --seeds are drawn from as well; what is written says which were kept.
    With --reference, all begin at its noisy picture, and gamma is below 1.  [default: 0]
    """
    if (ratio is None) != (classifier is None):
        raise click.UsageError("--reject and --classifier go together: give both or neither.")
    if (reference is None) != (feature_net is None):
        raise click.UsageError("--reference and --feature-net go together: give both or neither.")
    if reference is None and (score, reference_weight, correctors) != (None, None, None):
        raise click.UsageError("--reference-weight, --correctors and --score are for --reference: leave them out.")

    from functools import partial

    import msgspec
    import torch

    from edmdistill.checkpoints.load import load_denoiser, load_model, weights_digest
    from edmdistill.checkpoints.source import file_digest, open_source
    from edmdistill.errors import NotFiniteError
    from edmdistill.features.classifiers import load_classifier
    from edmdistill.machine.devices import pick_device
    from edmdistill.progress import progress_bar
    from edmdistill.sampling.build import build_sampler
    from edmdistill.sampling.feature_nets import load_feature_net
    from edmdistill.sampling.files import GRID_MOST, Samples, check_output, read_image
    from edmdistill.sampling.generate import describe_not_finite, drawn_classes, generate_images, is_latent
    from edmdistill.sampling.heun import Churn
    from edmdistill.sampling.labels import find_classes
    from edmdistill.sampling.rejection import candidates, sample_best
    from edmdistill.sampling.seeds import format_seeds, parse_seeds
    from edmdistill.sampling.spec import SamplerSpec
    from edmdistill.sampling.trajectory import ReferenceGuidance

    numbers = parse_seeds(seeds)
    where, precision = pick_device(device), getattr(torch, dtype) if dtype else None
    checkpoint = open_source(source)
    model = load_model(checkpoint, where, precision, sampler.weights)
    say_unfinished(checkpoint)
    flow, latent = model.flow, is_latent(model)
    check_output(out, latent=latent)
    if out.suffix.lower() == ".png" and len(numbers) > GRID_MOST:
        say(f"A grid shows the first {GRID_MOST:,} images, so only these of the {len(numbers):,} are drawn.")
        numbers = numbers[:GRID_MOST]
    names = model.label_names
    named = find_classes(words, flow.label_dim, names)
    turns = torch.tensor([named[i % len(named)] for i in range(len(numbers))]) if named else None
    classes = drawn_classes(model, numbers) if turns is None else turns
    judge = None if classifier is None else load_classifier(classifier, flow.label_dim, where)
    pull: ReferenceGuidance | None = None
    if reference is not None and feature_net is not None:
        size = flow.img_channels, flow.img_resolution
        pull = ReferenceGuidance(
            image=read_image(reference, *size),
            features=load_feature_net(feature_net, *size, where),
            score=None if score is None else load_denoiser(score, where, precision),
            weight=1.0 if reference_weight is None else reference_weight,
            correctors=10 if correctors is None else correctors,
        )
    noise = Churn(churn, churn_min, churn_max, churn_noise)
    spec = SamplerSpec(nfe=nfe, gamma=gamma, churn=noise, reference=pull, **sampler.arguments(flow, where, precision))
    draw = partial(generate_images, model, spec, batch=batch)
    request: dict[str, Any] = {
        "weights": weights_digest(checkpoint, model, sampler.weights),
        "seeds": format_seeds(numbers),
        "classes": named or "drawn",
        "sampler": msgspec.to_builtins(build_sampler(model, spec).record),
        "guide": sampler.guide and spec.guide and weights_digest(sampler.guide, spec.guide),
        "churn": None if noise == Churn() else str(noise),
        "reject": ratio,
        "classifier": classifier and file_digest(classifier),
        "reference": reference and file_digest(str(reference)),
        "feature net": feature_net and file_digest(feature_net.removeprefix("mask:")),
        "pull": None
        if pull is None
        else [pull.weight, pull.correctors, pull.score and weights_digest(str(score), pull.score)],
        "dtype": dtype,
    }
    samples = Samples(
        out,
        {name: value for name, value in request.items() if value is not None},
        len(numbers),
        numbers if judge is None else None,
        None if classes is None else classes.tolist(),
        latent=latent,
        label_names=names,
        source=source,
        overwrite=overwrite,
    )
    what = "latents of a VAE, undecoded" if latent else "images"
    if samples.finished:
        say(f"{out} holds these {len(numbers)} {what} already.")
    elif judge is not None and ratio is not None and classes is not None:
        total = len(candidates(numbers, classes, ratio).seeds)
        lost = "nothing was written, for rejection chooses when all images are drawn"
        with interruptible(lambda: lost), progress_bar(total) as bar:
            best, numbers = sample_best(
                partial(draw, on_progress=bar.update), judge, numbers, classes, ratio, batch=batch
            )
            samples.put(range(len(numbers)), best, numbers)
            samples.finish()
    else:
        with interruptible(lambda: samples.kept), progress_bar(len(numbers)) as bar:
            bar.update(len(numbers) - len(samples.missing))
            for positions in samples.batches(batch):
                own = None if classes is None else classes[positions]
                images = draw(seeds=[numbers[i] for i in positions], labels=own, on_progress=bar.update)
                samples.put(positions, images)
            samples.finish()
    if samples.broken:
        raise NotFiniteError(
            f"{out}: {describe_not_finite([numbers[i] for i in samples.broken], len(numbers))}; the others are written"
        )
    say(f"{out}: {len(numbers)} {what}")
