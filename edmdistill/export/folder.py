"""Exports a checkpoint as a folder for another program, whole or not at all, and proves that it draws our images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from msgspec.structs import replace

from edmdistill import __version__
from edmdistill.atomic import atomic_write
from edmdistill.checkpoints.config import CheckpointConfig, unfinished
from edmdistill.checkpoints.documents import front_matter, markdown
from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.layout import EXPORT, VAE_FILES
from edmdistill.checkpoints.licences import licence_fields, licence_words
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.source import Source
from edmdistill.checkpoints.vae import SUBFOLDER, Vae
from edmdistill.errors import CheckpointError, EdmDistillError, NoDecoder, without_secrets
from edmdistill.export import diffusers, nvidia, onnx, space, torch_export
from edmdistill.export.parity import SEEDS, Parity, table
from edmdistill.networks.flow import FlowNetwork
from edmdistill.sampling.decode import LatentDecoder, open_decoder
from edmdistill.trigflow import time_to_sigma, written_levels

HELD = """
`vae` holds {name}, which decodes the latents; it has a licence of its own (sha256 {sha256}).
"""
FILES = {".json", ".onnx", ".pkl", ".pt", ".pt2", ".pth", ".py", ".safetensors", ".zip"}
"""Suffixes that a name of an export, which is a folder, may not have."""


class Target(NamedTuple):
    """A program to export for.

    Attributes:
        header: front matter of README.md for the Hub, beside the licence.
        check_installed: raises if a package is missing.
        readme: how to use the folder.
        write: writes all but the README and the manifest, and compares images; the VAE, if any, is already in `vae`.
        without_vae: how to decode latents if the folder holds no VAE; None: the target does not decode.
    """

    header: dict[str, str]
    check_installed: Callable[[], None]
    readme: Callable[[FlowNetwork, CheckpointConfig], str]
    write: Callable[[Path, FlowNetwork, CheckpointConfig], tuple[Parity, ...]]
    without_vae: Callable[[CheckpointConfig], str] | None = None


def _model(library: str) -> dict[str, str]:
    return {"library_name": library, "pipeline_tag": "unconditional-image-generation"}


TARGETS = {
    "diffusers": Target(
        _model("diffusers"), diffusers.check_installed, diffusers.readme, diffusers.write, diffusers.without_vae
    ),
    "onnx": Target(_model("onnx"), onnx.check_installed, onnx.readme, onnx.write),
    "torch-export": Target(_model("pytorch"), lambda: None, torch_export.readme, torch_export.write),
    "nvidia": Target(_model("pytorch"), lambda: None, nvidia.readme, nvidia.write),
    "space": Target(space.HEADER, lambda: None, space.readme, space.write, space.without_vae),
}


def export(
    source: str | Path | Source,
    to: str,
    out: str | Path,
    *,
    vae: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[str], object] = lambda stage: None,
) -> tuple[Parity, ...]:
    """Writes a checkpoint for another program, and samples what is written as that program would.

    Args:
        source: a checkpoint of ours (folder or Hub id), a run directory, an official pickle or OpenAI's .pt.
        to: one of TARGETS.
        out: the folder to write.
        vae: what decodes latents, a folder or a Hub id, to be copied into the folder; None: the one that the checkpoint
            names, if it is in the Hub's cache.
        overwrite: replace an existing export.
        on_progress: called with a phrase at every step.
    Returns: the largest differences from our images.
    Raises: EdmDistillError: a package is missing, the target does not support the network, `out` is occupied, or the
        images differ.
    """
    target, out = TARGETS[to], Path(out)
    if out.suffix.lower() in FILES and not out.is_dir():
        raise CheckpointError(f"{out} looks like a file, but an export is a folder: use {out.with_suffix('')}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / EXPORT).is_file():
            raise CheckpointError(f"{out} exists and is not an export: choose another path")
        if not overwrite:
            raise CheckpointError(f"{out} holds an export already: choose another path, or add --overwrite")
    on_progress("loading")
    target.check_installed()
    flow, config = load_flow(source)
    origin = config.provenance
    config = replace(config, provenance=replace(origin, source=without_secrets(origin.source)))
    flow.requires_grad_(False).eval()
    readme, held_vae = target.readme(flow, config), _find_vae(target, config, to, vae)
    if held_vae is not None:
        readme += HELD.format(name=markdown(held_vae.name), sha256=held_vae.sha256)
    elif config.latent and target.without_vae is not None:
        readme += target.without_vae(config)
    generator = Generator(flow, config)
    levels = {
        str(nfe): written_levels(time_to_sigma(generator.schedule(nfe), flow.sigma_data).tolist())
        for nfe in sorted({*range(1, 9), *map(int, config.sampling.sigmas)})
    }
    with atomic_write(out) as folder, torch.no_grad():
        folder.mkdir()
        if held_vae is not None:
            (folder / SUBFOLDER).mkdir()
            for file in VAE_FILES:
                shutil.copyfile(held_vae.folder / file, folder / SUBFOLDER / file)
        on_progress("writing, and comparing images")
        parity = target.write(folder, flow, config)
        document = {
            "schema_version": 1,
            "edmdistill": __version__,
            "to": to,
            "sigmas": levels,
            "gamma": config.sampling.gamma,
            "parity": [row._asdict() for row in parity],
            "checkpoint": config,
        }
        (folder / EXPORT).write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n")
        (folder / "README.md").write_text(_card(target, config, readme, parity), encoding="utf-8")
    return parity


def _find_vae(target: Target, config: CheckpointConfig, to: str, name: str | None) -> Vae | None:
    """Returns the VAE to put into the folder, if any.

    Raises: CheckpointError: the VAE cannot be used.  EdmDistillError: a VAE would have no effect.
    """
    if target.without_vae is None:
        if name is not None:
            raise EdmDistillError(f"--to {to} holds the network alone, so --vae {name} has no effect: leave it out")
        return None
    try:
        decoder = open_decoder(config.encoder, name)
    except NoDecoder:
        if name is not None:
            raise
        return None
    return decoder.vae if isinstance(decoder, LatentDecoder) else None


def _card(target: Target, config: CheckpointConfig, readme: str, parity: tuple[Parity, ...]) -> str:
    licence, note = licence_words(config.provenance.licence), unfinished(config)
    return f"""{front_matter(target.header | licence_fields(config.provenance.licence))}
A {config.stage} from {markdown(config.provenance.source)}, exported by edmdistill {__version__}.
{licence}{f" {note}" if note else ""}

{readme}
Largest difference from edmdistill's own images of seeds 0 to {max(SEEDS)}, relative to the largest pixel, by the number
of network evaluations:

{table(parity)}
"""
