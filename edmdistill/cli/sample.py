"""`edmdistill sample`: images from a teacher or a generator."""

from pathlib import Path

import click

SOLVERS = "heun", "ddim", "dpm-solver-2s", "dpm-solver++2m"


@click.command("sample")
@click.argument("source")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="DIR|FILE.npz|FILE.png", help="Where to."
)
@click.option("--seeds", default="0-63", show_default=True, metavar="LIST", help="One image a seed, as in 0-63,100.")
@click.option(
    "--nfe", type=click.IntRange(min=1), help="Network evaluations.  [default: generator 2, teacher 35 or 63]"
)
@click.option("--class", "words", multiple=True, metavar="NAME|ID", help="Class; several take turns.  [default: drawn]")
@click.option("--gamma", type=float, help="Generator: share of fresh noise, 0 to 1.  [default: the checkpoint's]")
@click.option(
    "--t", "times", metavar="LIST", help="Generator: noise levels as in 80,2.5 or radians as in 1.56rad,1.1rad."
)
@click.option(
    "--guidance", type=float, metavar="W", help="Weight of the guidance, 1 = none.  [default: 1, or the least it knows]"
)
@click.option(
    "--guide", metavar="SOURCE", help="Teacher: network to guide away from.  [default: itself, without classes]"
)
@click.option(
    "--force-guidance", is_flag=True, help="Let a teacher guide itself that was never trained without its classes."
)
@click.option("--solver", type=click.Choice(SOLVERS), help="Teacher, or CTM's generator.  [default: heun]")
@click.option("--churn", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Teacher: S_churn.")
@click.option("--churn-min", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Teacher: S_min.")
@click.option(
    "--churn-max", type=click.FloatRange(min=0), default=float("inf"), show_default=True, help="Teacher: S_max."
)
@click.option("--churn-noise", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Teacher: S_noise.")
@click.option(
    "--reject",
    "ratio",
    type=click.FloatRange(min=0, max=1, max_open=True),
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
@click.option("--reference-weight", type=float, help="For --reference: of the loss.  [default: 1]")
@click.option("--correctors", type=click.IntRange(min=0), help="For --reference: at a noise level.  [default: 10]")
@click.option("--score", metavar="SOURCE", help="For --reference: the teacher, for a generator that knows no score.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
@click.option("--dtype", type=click.Choice(["float32", "float64", "bfloat16", "float16"]), help="Of the network.")
def command(
    source: str,
    out: Path,
    seeds: str,
    nfe: int | None,
    words: tuple[str, ...],
    gamma: float | None,
    times: str | None,
    guidance: float | None,
    guide: str | None,
    force_guidance: bool,
    solver: str | None,
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

    A folder gets a PNG for each seed and a grid; a .png is the grid alone; an .npz holds images (uint8, [N,H,W,C]),
    seeds and labels. An image depends on its seed and class only, not on the batch. A network on VAE latents writes
    them to an .npz, undecoded.

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

    import torch
    from tqdm import tqdm

    from edmdistill.checkpoints.convert import load_denoiser, load_model
    from edmdistill.evaluation.classifiers import load_classifier
    from edmdistill.sampling.feature_nets import load_feature_net
    from edmdistill.sampling.files import check_output, read_image, write_samples
    from edmdistill.sampling.generate import drawn_classes, is_latent, sample
    from edmdistill.sampling.heun import Churn
    from edmdistill.sampling.labels import find_class
    from edmdistill.sampling.load import class_names, pick_device
    from edmdistill.sampling.rejection import candidates, sample_best
    from edmdistill.sampling.seeds import parse_seeds
    from edmdistill.sampling.times import parse_times
    from edmdistill.sampling.trajectory import Towards

    numbers = parse_seeds(seeds)
    where, precision = pick_device(device), getattr(torch, dtype) if dtype else None
    model = load_model(source, where, precision)
    flow, latent = model.flow, is_latent(model)
    check_output(out, latent=latent)
    named = [find_class(word, flow.label_dim, class_names(model, source)) for word in words]
    turns = torch.tensor([named[i % len(named)] for i in range(len(numbers))]) if named else None
    classes = drawn_classes(model, numbers) if turns is None else turns
    levels = {"sigma_data": flow.sigma_data, "sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
    judge = None if classifier is None else load_classifier(classifier, flow.label_dim, where)
    towards = None
    if reference is not None and feature_net is not None:
        size = flow.img_channels, flow.img_resolution
        towards = Towards(
            reference=read_image(reference, *size),
            features=load_feature_net(feature_net, *size, where),
            score=None if score is None else load_denoiser(score, where, precision),
            weight=1.0 if reference_weight is None else reference_weight,
            correctors=10 if correctors is None else correctors,
        )
    total = len(numbers)
    if ratio is not None and classes is not None:
        total = len(candidates(numbers, classes, ratio).seeds)
    with tqdm(total=total, unit="image", delay=3) as bar:
        draw = partial(
            sample,
            model,
            nfe,
            gamma=gamma,
            times=None if times is None else parse_times(times, **levels),
            guidance=guidance,
            guide=None if guide is None else load_denoiser(guide, where, precision),
            force_guidance=force_guidance,
            solver=solver,
            churn=Churn(churn, churn_min, churn_max, churn_noise),
            towards=towards,
            batch=batch,
            on_progress=bar.update,
        )
        if judge is not None and ratio is not None and classes is not None:
            samples, numbers = sample_best(draw, judge, numbers, classes, ratio, batch=batch)
        else:
            samples = draw(seeds=numbers, labels=classes)
    write_samples(out, samples, numbers, None if classes is None else classes.tolist(), latent=latent)
    what = "latents of a VAE, undecoded" if latent else "images"
    click.echo(f"{out}: {len(numbers)} {what}", err=True)
