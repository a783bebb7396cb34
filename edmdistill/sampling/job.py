"""Draws the images of one command into its output, and says what decides them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec

from edmdistill.checkpoints.generator import Generator
from edmdistill.checkpoints.load import Weights, weights_digest
from edmdistill.checkpoints.source import Source
from edmdistill.errors import EdmDistillError
from edmdistill.networks.flow import Denoiser
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.decode import Decoder, LatentDecoder
from edmdistill.sampling.files import Samples
from edmdistill.sampling.generate import drawn_classes, generate_images
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.output import Layout
from edmdistill.sampling.reference import ReferenceFiles
from edmdistill.sampling.rejection import Rejection, candidates, sample_best
from edmdistill.sampling.seeds import format_seeds
from edmdistill.sampling.spec import SamplerSpec


@dataclass(frozen=True, kw_only=True)
class SampleJob:
    """Images to draw.

    Attributes:
        model, spec: see `generate_images`.
        seeds: one for each image.  [N]
        cycle: classes that the images take turns in; () = drawn from the seeds.
        rejection: draw more images, and keep the best.
        decoder: from what the model makes to pictures; None: keep a VAE's latents as they are.
        batch: images at a time.
    Raises: EdmDistillError: rejection of latents.
    """

    model: Generator | Denoiser
    spec: SamplerSpec
    seeds: Sequence[int]
    cycle: Sequence[int] = ()
    rejection: Rejection | None = None
    decoder: Decoder | None = to_uint8
    batch: int = 64

    def __post_init__(self) -> None:
        if self.rejection is not None and self.decoder is None:
            raise EdmDistillError("a classifier rejects pictures, and --latents keeps latents: leave one of them out")

    @cached_property
    def classes(self) -> list[int] | None:
        """The class of each image; None for an unconditional model.  [N]"""
        if self.cycle:
            return [self.cycle[i % len(self.cycle)] for i in range(len(self.seeds))]
        classes = drawn_classes(self.model, self.seeds)
        return None if classes is None else classes.tolist()

    @property
    def total(self) -> int:
        """The number of images that are drawn; more than are kept, with rejection."""
        if self.rejection is None:
            return len(self.seeds)
        return len(candidates(self.seeds, self.classes or (), self.rejection.ratio).seeds)

    def request(
        self,
        source: Source,
        *,
        weights: Weights = "ema",
        guide: str | None = None,
        reference: ReferenceFiles | None = None,
    ) -> dict[str, Any]:
        """Returns all that decides the images, as JSON; digests stand for files.

        Args:
            source, weights: what the model was loaded from.
            guide, reference: what the spec's guide and reference were loaded from.
        """
        spec, rejection = self.spec, self.rejection
        document = {
            "weights": weights_digest(source, self.model, weights),
            "seeds": format_seeds(self.seeds),
            "classes": list(self.cycle) or "drawn",
            "sampler": msgspec.to_builtins(build_sampler(self.model, spec).record),
            "guide": weights_digest(guide, spec.guide) if guide is not None and spec.guide is not None else None,
            "reject": None if rejection is None else rejection.ratio,
            "classifier": None if rejection is None else rejection.classifier_digest,
            **({} if reference is None or spec.reference is None else reference.request(spec.reference)),
            "vae": self.decoder.vae.sha256 if isinstance(self.decoder, LatentDecoder) else None,
        }
        return {name: value for name, value in document.items() if value is not None}

    def open_samples(
        self, out: Path, request: Mapping[str, Any], *, source: str, overwrite: bool, layout: Layout = "edmdistill"
    ) -> Samples:
        """Returns the output of this job, with what earlier commands have drawn of it.  Args: see Samples."""
        return Samples(
            out,
            request,
            len(self.seeds),
            None if self.rejection else self.seeds,
            self.classes,
            decoder=self.decoder,
            label_names=self.model.label_names,
            source=source,
            overwrite=overwrite,
            layout=layout,
        )

    def draw_into(self, samples: Samples, on_progress: Callable[[int], object] | None = None) -> None:
        """Draws what is missing from the samples of this job, and finishes them.

        Raises: CheckpointError: the disk refuses.
        """
        samples.claim()
        draw = partial(generate_images, self.model, self.spec, batch=self.batch, on_progress=on_progress)
        if self.rejection is not None and self.classes is not None:
            images, seeds = sample_best(
                draw,
                self.rejection.log_probability,
                self.seeds,
                self.classes,
                self.rejection.ratio,
                batch=self.batch,
                decode=self.decoder or to_uint8,
            )
            samples.put(range(len(seeds)), images, seeds)
        else:
            for positions in samples.batches(self.batch):
                labels = None if self.classes is None else [self.classes[i] for i in positions]
                samples.put(positions, draw(seeds=[self.seeds[i] for i in positions], labels=labels))
        samples.finish()
