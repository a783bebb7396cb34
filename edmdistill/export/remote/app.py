"""A few-step generator in the browser, by gradio: on a Space of the Hugging Face Hub, or by `python app.py`.

The generator is in the folder `generator` beside this file, unless the variable GENERATOR names another: a folder, or a
repository of the Hub, OWNER/NAME or OWNER/NAME@REVISION.
"""

from __future__ import annotations

import os
import shlex
import time
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

import edmdistill
from edmdistill.checkpoints.config import default_nfe
from edmdistill.checkpoints.documents import code_block, markdown
from edmdistill.checkpoints.encoder import vae_words
from edmdistill.errors import printable
from edmdistill.sampling.decode import Decoder, model_decoder
from edmdistill.sampling.generate import is_latent
from edmdistill.sampling.grid import image_grid, thumbnails

SOURCE = os.environ.get("GENERATOR") or str(Path(__file__).parent / "generator")
SIDE = 640
"""Largest side of the picture in pixels. Every pixel of an image becomes a square of whole pixels, without blur."""
MOST = 8
"""Largest number of evaluations to choose from, unless the generator has schedules for more."""
OWN = -1
"""In place of a class: each seed draws one."""
STYLE = "#picture img { image-rendering: pixelated } #status code { white-space: pre-wrap; overflow-wrap: anywhere }"


def classes(generator: edmdistill.Generator) -> list[tuple[str, int]]:
    """Returns the entries of the class picker, names and numbers; none for a generator without classes."""
    config = generator.config
    names = [printable(name) for name in config.label_names or map(str, range(config.label_dim))]
    return [("drawn by each seed", OWN), *((name, label) for label, name in enumerate(names))] if names else []


def settings(generator: edmdistill.Generator) -> dict[str, Any]:
    """Returns the initial settings of the page, as arguments of `draw`."""
    return {
        "nfe": default_nfe(generator.config),
        "gamma": generator.config.sampling.gamma,
        "label": OWN,
        "seed": 0,
        "count": 16,
        "guidance": generator.guidance[0],
    }


@cache
def decoder(generator: edmdistill.Generator) -> Decoder:
    """Returns what turns the generator's output into pixels: for latents, the VAE beside this file."""
    vae = Path(__file__).parent / "vae"
    return model_decoder(generator, str(vae) if vae.is_dir() and is_latent(generator) else None)


def draw(
    generator: edmdistill.Generator, nfe: int, gamma: float, label: int, seed: int | None, count: int, guidance: float
) -> tuple[Image.Image, str]:
    """Returns a picture of the images of `count` seeds from `seed` on, and a text about it.

    Args:
        seed: None, an empty field, means 0.
    """
    first = int(seed or 0)
    seeds = range(first, first + int(count))
    began = time.perf_counter()
    images = edmdistill.sample(
        generator,
        int(nfe),
        seeds=seeds,
        labels=None if label == OWN else int(label),
        gamma=gamma,
        guidance=guidance,
    )
    seconds = time.perf_counter() - began
    pixels = decoder(generator)(images)
    columns = next(n for n in range(1, len(seeds) + 1) if n * n >= len(seeds))
    pixels = thumbnails(pixels, max(1, SIDE // columns))
    picture = image_grid(pixels, columns, scale=max(1, SIDE // columns // pixels.shape[-1]))
    words = ["edmdistill", "sample", Path(SOURCE).name if Path(SOURCE).is_dir() else SOURCE, "--nfe", f"{nfe:g}"]
    words += ["--gamma", f"{gamma:g}", "--seeds", f"{first}-{seeds[-1]}" if len(seeds) > 1 else str(first)]
    words += vae_words(generator.encoder)
    words += [] if label == OWN else ["--class", str(label)]
    words += ["--guidance", f"{guidance:g}"] if generator.guidance[0] < generator.guidance[1] else []
    line = shlex.join([*words, "--out", "images"])
    return picture, f"Drawn in {seconds:.2f} seconds. The same images on the command line:\n\n{code_block(line, 'sh')}"


def page(generator: edmdistill.Generator) -> Any:
    """Returns the page, as gradio's Blocks."""
    import gradio as gr

    config, first, names = generator.config, settings(generator), classes(generator)
    low, high = generator.guidance
    most = max([MOST, *map(int, config.sampling.sigmas)])
    title = f"A few-step generator by {config.method}"
    about = f"Made by edmdistill from {config.provenance.source}."
    with gr.Blocks(title=printable(title)) as blocks:
        gr.Markdown(f"# {markdown(title)}\n\n{markdown(about)}")
        with gr.Row():
            with gr.Column(min_width=280):
                nfe = gr.Slider(1, most, first["nfe"], step=1, label="Network evaluations (NFE)")
                gamma = gr.Slider(
                    0, 1, first["gamma"], step=0.05, label="Gamma", info="Share of fresh noise between evaluations"
                )
                label = gr.Dropdown(names or [("none", OWN)], value=OWN, label="Class", visible=bool(names))
                seed = gr.Number(first["seed"], precision=0, minimum=0, maximum=2**31, label="First seed")
                count = gr.Slider(1, 64, first["count"], step=1, label="Images")
                guidance = gr.Slider(low, max(high, low + 1), low, step=0.1, label="Guidance", visible=low < high)
                again = gr.Button("Next seeds", variant="primary")
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    type="pil",
                    format="png",
                    interactive=False,
                    show_label=False,
                    container=False,
                    buttons=["download"],
                    elem_id="picture",
                )
                status = gr.Markdown(elem_id="status")
        controls = [nfe, gamma, label, seed, count, guidance]
        changes = [blocks.load, *(control.change for control in controls)]
        shown = [picture, status]
        gr.on(
            changes,
            lambda *values: draw(generator, *values),
            controls,
            shown,
            show_progress="minimal",
            trigger_mode="always_last",
        )
        again.click(lambda seed, count: int(seed or 0) + count, [seed, count], seed)
    return blocks


if __name__ == "__main__":
    page(edmdistill.load_generator(SOURCE)).launch(css=STYLE)
