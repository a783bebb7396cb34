"""Exports to diffusers: a pipeline folder that DiffusionPipeline.from_pretrained loads, without this package.

Its code is bundled from ours (`export.bundle`), not traced: it can be read, and supports .to(device, dtype), offloading
and torch.compile.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edmdistill.checkpoints.config import CheckpointConfig, default_nfe, describe
from edmdistill.checkpoints.encoder import latent_encoder
from edmdistill.checkpoints.store import save_tensors
from edmdistill.checkpoints.vae import SUBFOLDER, diffusers_class
from edmdistill.errors import EdmDistillError
from edmdistill.export.bundle import bundle
from edmdistill.export.one_step import OneStep
from edmdistill.export.parity import NFE, SEEDS, Parity, compare
from edmdistill.networks.flow import FlowNetwork
from edmdistill.sampling.decode import Decoder, open_decoder

FILES = {
    "pipeline.py": "edmdistill.export.remote.pipeline",
    "scheduler/gamma_scheduler.py": "edmdistill.export.remote.scheduler",
    "unet/edmdistill_network.py": "edmdistill.export.remote.network",
}
"""Files of code, and the modules that they are bundled from."""


def check_installed() -> None:
    """Raises: EdmDistillError: diffusers cannot be imported."""
    diffusers_class("DiffusionPipeline", extra="diffusers", needed_by="--to diffusers needs")


def readme(flow: FlowNetwork, config: CheckpointConfig) -> str:
    """Raises: EdmDistillError: it is a teacher, which gamma-sampling is not for."""
    if config.stage != "generator":
        raise EdmDistillError("a pipeline samples a generator, but this is a teacher: choose another --to")
    classes = ", class_labels=0" if flow.label_dim else ""
    return f"""\
    import torch
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("PATH_OR_HUB_ID", trust_remote_code=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(16)]
    images = pipe(num_inference_steps={default_nfe(config)}, generator=generator{classes}).images

One generator an image gives the images of `edmdistill sample --seeds 0-15`. `sigmas` names the noise levels, falling,
from {flow.sigma_max:g} to {flow.sigma_min:g}, `gamma=0.5` the share of fresh noise between them; classes that are not
named are drawn.

The remote code is plain torch, bundled from edmdistill's source, and does not need edmdistill: `pipeline.py`,
`scheduler/gamma_scheduler.py` and `unet/edmdistill_network.py`, under Apache-2.0.
"""


def without_vae(config: CheckpointConfig) -> str:
    """Returns how a VAE is given to a pipeline that holds none."""
    name = json.dumps(str(config.encoder.get("vae_name", "stabilityai/sd-vae-ft-mse")))
    return f"""
The VAE that decodes the latents is not in this folder:

    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained({name})
    pipe = DiffusionPipeline.from_pretrained("PATH_OR_HUB_ID", trust_remote_code=True, vae=vae)
"""


def write(folder: Path, flow: FlowNetwork, config: CheckpointConfig) -> tuple[Parity, ...]:
    """Writes the pipeline, and loads it as its users do."""
    from diffusers import __version__

    def put(file: str, content: dict[str, object]) -> None:
        text = json.dumps({"_diffusers_version": __version__} | content, indent=2)
        (folder / file).write_text(text + "\n", encoding="utf-8")

    for part in ("scheduler", "unet"):
        (folder / part).mkdir()
    for file, module in FILES.items():
        (folder / file).write_text(bundle(module), encoding="utf-8")
    known, latents = describe(flow), latent_encoder(config.encoder)
    names = config.label_names
    index: dict[str, object] = {
        "_class_name": ["pipeline", "GammaPipeline"],
        "unet": ["edmdistill_network", "EdmdistillNetwork"],
        "scheduler": ["gamma_scheduler", "GammaScheduler"],
        "vae": ["diffusers", "AutoencoderKL"] if (folder / SUBFOLDER).is_dir() else [None, None],
        "id2label": None if names is None else {str(i): name for i, name in enumerate(names)},
        "guidance_range": config.guidance.range if flow.guided and config.guidance else None,
        "latent_scale": None if latents is None else latents.scale,
        "latent_bias": None if latents is None else latents.bias,
        "latent_range": None if latents is None else latents.range,
    }
    put("model_index.json", index)
    spec = known["network"]
    network = {"kind": spec.kind, "arguments": spec.arguments, "preconditioning": known["preconditioning"]}
    put("unet/config.json", {"_class_name": "EdmdistillNetwork", **network})
    schedule = {"sigmas": config.sampling.sigmas, "gamma": config.sampling.gamma}
    levels = {"sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
    put("scheduler/scheduler_config.json", {"_class_name": "GammaScheduler", **schedule, **levels})
    step = OneStep(flow.network, flow.preconditioning)
    weights = {f"one_step.{name}": tensor for name, tensor in step.state_dict().items()}
    save_tensors(folder / "unet/diffusion_pytorch_model.safetensors", weights, {"format": "pt"})
    pipe = _loaded(folder)

    def images(nfe: int) -> Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        drawn: Tensor = pipe(num_inference_steps=nfe, generator=generator, output_type="latent").images
        return drawn if latents is not None else drawn.clamp(-1, 1)

    parity = compare(flow, config, images)
    if pipe.vae is not None:
        _require_pixels(pipe, open_decoder(config.encoder, str(folder / SUBFOLDER)), images(NFE[-1]))
    return parity


def _require_pixels(pipe: Any, decode: Decoder, latents: Tensor) -> None:
    """Raises: EdmDistillError: the pipeline's pictures of these latents differ from ours by more than 1 of 255."""
    ours, pictures = decode(latents), pipe.pictures(latents, "pil")
    theirs = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    difference = int((theirs.int() - ours.int()).abs().max())
    if difference > 1:
        raise EdmDistillError(
            f"nothing was exported: its decoded pictures differ from ours by {difference} of 255; please report this"
        )


def _loaded(folder: Path) -> Any:
    """Returns the pipeline, loaded as its users load it, but silently."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(level)
    pipe.set_progress_bar_config(disable=True)
    return pipe
