"""A few-step generator as a diffusers pipeline."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.sampling.grid import to_image, to_uint8
from edmdistill.sampling.labels import find_class

VAE_BATCH = 8
"""Latents that are decoded at a time."""


class GammaPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws images by gamma-sampling; with a list of generators, image i depends on generator i and its class alone.

    Args:
        unet: EdmdistillNetwork.
        scheduler: GammaScheduler.
        vae: decodes latents, for a network that makes them.
        id2label: names of the classes by number, "0", "1" ...; several names of one class are separated by commas.
        guidance_range: smallest and largest guidance weight, for a network that takes one.
        latent_scale, latent_bias: latents are (x0 - bias) / scale, by channel; None for pixels.
        latent_range: of the pixels that the VAE gives: edm2, [0, 1], or scm, [-1, 1]; None for pixels.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    source = Path(__file__).read_text(encoding="utf-8")  # now: diffusers puts the next pipeline's code in this file

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: Mapping[str, str] | None = None,
        guidance_range: Sequence[float] | None = None,
        latent_scale: Sequence[float] | None = None,
        latent_bias: Sequence[float] | None = None,
        latent_range: str | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label,
            guidance_range=guidance_range,
            latent_scale=latent_scale,
            latent_bias=latent_bias,
            latent_range=latent_range,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Writes a folder that from_pretrained loads, with its code.  Args: see DiffusionPipeline.save_pretrained."""
        for folder, part in {"": self, **self._parts_with_code()}.items():
            file = Path(save_directory, folder, f"{_file(part)}.py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(part.source, encoding="utf-8")
        super().save_pretrained(save_directory, **options)

    def to_json_string(self) -> str:
        """Returns model_index.json, in which parts with code are of the files beside them."""
        index = json.loads(super().to_json_string()) | {"_class_name": [_file(self), type(self).__name__]}
        index |= {name: [_file(part), type(part).__name__] for name, part in self._parts_with_code().items()}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _parts_with_code(self) -> dict[str, Any]:
        parts = {name: getattr(part, "_orig_mod", part) for name, part in self.components.items()}  # or compiled
        return {name: part for name, part in parts.items() if hasattr(part, "source")}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        gamma: float | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Draws as many images as the lists of generators or classes have entries, or batch_size of them; else one.

        Args:
            class_labels: number or name, one for all images or one for each; None = drawn. A name means what it means
                to `edmdistill sample --class`.
            num_inference_steps: network evaluations; None = 2, or the fewest that the scheduler has levels for.
            sigmas: noise levels to evaluate at, decreasing, in place of num_inference_steps.
            gamma: share of fresh noise between the steps, in [0, 1]; None = the scheduler's.
            guidance_scale: weight of the distilled guidance; None = the smallest that the network takes.
            generator: a list [torch.Generator().manual_seed(i) for i in seeds] gives the images that
                `edmdistill sample --seeds` gives.
            output_type: pil, np ([B,H,W,C] in [0, 1]), pt ([B,C,H,W] in [0, 1]) or latent (what the network makes).
        Raises: ValueError: lengths differ, a class or weight does not exist, a name means several classes, or there are
            latents but no vae.
        """
        class_labels = class_labels.tolist() if isinstance(class_labels, Tensor) else class_labels
        counts = [len(x) for x in (class_labels, generator) if isinstance(x, Sequence) and not isinstance(x, str)]
        counts += [] if batch_size is None else [batch_size]
        if len(set(counts)) > 1:
            raise ValueError(f"class_labels, generator and batch_size have lengths {counts}: make them equal")
        if self.config.latent_scale and self.vae is None and output_type != "latent":
            raise ValueError(
                "this network makes the latents of a VAE: load the pipeline with vae=AutoencoderKL.from_pretrained("
                "'stabilityai/sd-vae-ft-mse'), or ask for output_type='latent'"
            )
        network, device = self.unet.one_step.network, self._execution_device
        shape = counts[0] if counts else 1, network.img_channels, network.img_resolution, network.img_resolution
        noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        classes = self._classes(class_labels, shape[0], network.label_dim, generator, device)

        w = self._guidance(guidance_scale, shape[0], device)

        self.scheduler.set_timesteps(num_inference_steps, device=device, sigmas=sigmas)
        x = self.scheduler.init_noise_sigma * noise
        for sigma in self.progress_bar(self.scheduler.timesteps):
            sigma_next = self.scheduler.sigma_next(gamma)
            x0 = self.unet(x, sigma.expand(len(x)), classes, w=w, sigma_next=sigma_next.expand(len(x)))
            x = self.scheduler.step(x0, sigma, x, gamma=gamma, generator=generator)

        images = x if output_type == "latent" else self.pictures(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _classes(
        self,
        labels: int | str | Sequence[int | str] | None,
        count: int,
        label_dim: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Tensor | None:
        """Returns the class numbers.  int64 [count]"""
        if not label_dim:
            if labels is not None:
                raise ValueError("class_labels were given, but this network has no classes: leave them out")
            return None
        # Drawn even if classes are given, so that the noise after them is the same.
        streams = generator if isinstance(generator, list) else [generator] * count
        drawn = [int(torch.randint(label_dim, [], generator=g, device=g.device if g else "cpu")) for g in streams]
        if labels is None:
            return torch.tensor(drawn, device=device)
        words = [labels] * count if isinstance(labels, int | str) else list(labels)
        id2label = self.config.id2label
        names = None if id2label is None else [id2label[str(number)] for number in range(label_dim)]
        try:
            numbers = [find_class(word, label_dim, names) if isinstance(word, str) else int(word) for word in words]
        except EdmDistillError as error:
            raise ValueError(str(error)) from error
        for number in numbers:
            if not 0 <= number < label_dim:
                raise ValueError(f"there is no class {number}: classes are 0 to {label_dim - 1}")
        return torch.tensor(numbers, device=device)

    def _guidance(self, scale: float | None, count: int, device: torch.device) -> Tensor | None:
        """Returns the guidance weights, for a network that takes one.  [count]"""
        known = self.config.guidance_range
        if known is None:
            if scale is not None:
                raise ValueError("guidance_scale was given, but this network takes none: leave it out")
            return None
        scale = known[0] if scale is None else scale
        if not known[0] <= scale <= known[1]:
            raise ValueError(f"guidance_scale must be in [{known[0]:g}, {known[1]:g}], not {scale:g}")
        return torch.full((count,), scale, device=device)

    def _decode(self, x0: Tensor) -> Tensor:
        """Returns x0 as pixels, nominally in [-1, 1], or in the VAE's range.  [B,C,H,W]"""
        if self.vae is None:
            return x0
        scale, bias = (
            x0.new_tensor(values)[:, None, None] for values in (self.config.latent_scale, self.config.latent_bias)
        )
        latents = ((x0 - bias) / scale).to(self.vae.dtype)
        starts = range(0, len(latents), VAE_BATCH)
        return torch.cat([self.vae.decode(latents[at : at + VAE_BATCH]).sample.float() for at in starts])

    @torch.no_grad()
    def pictures(self, x0: Tensor, kind: str = "pil") -> object:
        """Returns the network's output in an output_type.

        Source: EDM2, training/encoders.py: pixels of a VAE in [0, 1] are multiplied by 255 and cut.
        """
        pixels = self._decode(x0)
        unit = pixels.clamp(0, 1) if self.config.latent_range == "edm2" else (pixels / 2 + 0.5).clamp(0, 1)
        if kind == "pil":
            cut = unit.mul(255).to(torch.uint8)
            return [to_image(image) for image in (cut if self.config.latent_range == "edm2" else to_uint8(pixels))]
        if kind == "pt":
            return unit
        if kind == "np":
            array: np.ndarray = unit.permute(0, 2, 3, 1).cpu().numpy()
            return array
        raise ValueError(f"output_type must be pil, np, pt or latent, not {kind!r}")


def _file(part: object) -> str:
    """Returns the name of the file that holds the code of a part, without .py."""
    return type(part).__module__.rpartition(".")[2]
