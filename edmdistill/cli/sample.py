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
@click.option("--solver", type=click.Choice(SOLVERS), help="Teacher, or CTM's generator.  [default: heun]")
@click.option("--churn", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Teacher: S_churn.")
@click.option("--churn-min", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Teacher: S_min.")
@click.option(
    "--churn-max", type=click.FloatRange(min=0), default=float("inf"), show_default=True, help="Teacher: S_max."
)
@click.option("--churn-noise", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Teacher: S_noise.")
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
    solver: str | None,
    churn: float,
    churn_min: float,
    churn_max: float,
    churn_noise: float,
    batch: int,
    device: str | None,
    dtype: str | None,
) -> None:
    """Draw images from SOURCE: a teacher (official pickle, or a checkpoint of ours), a generator, or a run directory.

    A folder gets a PNG for each seed and a grid; a .png is the grid alone; an .npz holds images (uint8, [N,H,W,C]),
    seeds and labels. An image depends on its seed and class only, not on the batch. A network on VAE latents writes
    them to an .npz, undecoded.
    """
    import torch
    from tqdm import tqdm

    from edmdistill.checkpoints.convert import load_denoiser, load_model
    from edmdistill.sampling.files import check_output, write_samples
    from edmdistill.sampling.generate import drawn_classes, is_latent, sample
    from edmdistill.sampling.heun import Churn
    from edmdistill.sampling.labels import find_class
    from edmdistill.sampling.load import class_names, pick_device
    from edmdistill.sampling.seeds import parse_seeds
    from edmdistill.sampling.times import parse_times

    numbers = parse_seeds(seeds)
    where, precision = pick_device(device), getattr(torch, dtype) if dtype else None
    model = load_model(source, where, precision)
    flow, latent = model.flow, is_latent(model)
    check_output(out, latent=latent)
    named = [find_class(word, flow.label_dim, class_names(model, source)) for word in words]
    turns = torch.tensor([named[i % len(named)] for i in range(len(numbers))]) if named else None
    classes = drawn_classes(model, numbers) if turns is None else turns
    levels = {"sigma_data": flow.sigma_data, "sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
    with tqdm(total=len(numbers), unit="image", delay=3) as bar:
        samples = sample(
            model,
            nfe,
            seeds=numbers,
            labels=classes,
            gamma=gamma,
            times=None if times is None else parse_times(times, **levels),
            guidance=guidance,
            guide=None if guide is None else load_denoiser(guide, where, precision),
            solver=solver,
            churn=Churn(churn, churn_min, churn_max, churn_noise),
            batch=batch,
            on_progress=bar.update,
        )
    write_samples(out, samples, numbers, None if classes is None else classes.tolist(), latent=latent)
    what = "latents of a VAE, undecoded" if latent else "images"
    click.echo(f"{out}: {len(numbers)} {what}", err=True)
