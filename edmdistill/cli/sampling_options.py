"""The options that say how to sample a network, in groups that commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import click

from edmdistill.cli.options import list_option, option_group, say, say_unfinished
from edmdistill.cli.types import MAX_GUIDANCE, SOLVERS, FiniteFloat, Name, NameList
from edmdistill.errors import EdmDistillError

if TYPE_CHECKING:
    from edmdistill.checkpoints.generator import Generator
    from edmdistill.checkpoints.load import Dtype
    from edmdistill.networks.flow import Denoiser, FlowNetwork
    from edmdistill.sampling.decode import Decoder
    from edmdistill.sampling.heun import Churn
    from edmdistill.sampling.spec import SamplerSpec


def _load_guide(guide: str | None, flow: FlowNetwork, dtype: Dtype) -> Denoiser | None:
    """Returns the network of --guide, on the device of the network that it guides; None: it was not given."""
    from edmdistill.checkpoints.load import load_denoiser

    say_unfinished(guide)
    return None if guide is None else load_denoiser(guide, flow.device, dtype)


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """The options of `sampler_options`, as they were typed."""

    times: str | None
    guidance: float | None
    guide: str | None
    force_guidance: bool
    solver: str | None
    weights: Literal["ema", "raw"] = "ema"

    def spec(self, flow: FlowNetwork, dtype: Dtype, **others: Any) -> SamplerSpec:
        """Returns the spec that they stand for; a guide is loaded, on the network's device.

        Args:
            flow: the network to sample.
            dtype: as load_model's, of the network and of the guide.
            others: fields of the spec that have other options.
        """
        from edmdistill.sampling.spec import SamplerSpec
        from edmdistill.sampling.times import parse_times

        levels = {"sigma_data": flow.sigma_data, "sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
        return SamplerSpec(
            times=None if self.times is None else parse_times(self.times, **levels),
            guidance=self.guidance,
            guide=_load_guide(self.guide, flow, dtype),
            force_guidance=self.force_guidance,
            solver=self.solver,
            **others,
        )


@dataclass(frozen=True, kw_only=True)
class SamplerGrid:
    """The options of `sampler_grid_options`, as they were typed: each combination is a sampler."""

    times: tuple[str, ...]
    guidance: list[float] | None
    solvers: tuple[tuple[str, ...], ...]
    guide: str | None
    force_guidance: bool

    def specs(
        self, flow: FlowNetwork, dtype: Dtype, nfes: Sequence[int | None], gammas: Sequence[float | None]
    ) -> list[SamplerSpec]:
        """Returns the specs that they stand for, NFE running fastest; a guide is loaded.

        The guide is left out at weight 1, unless that is the only one, where the spec refuses it.

        Args:
            flow, dtype: as SamplerOptions.spec's.
            nfes, gammas: those of the grid; None: the network's default.
        """
        from edmdistill.sampling.spec import SamplerSpec
        from edmdistill.sampling.times import parse_times

        levels = {"sigma_data": flow.sigma_data, "sigma_min": flow.sigma_min, "sigma_max": flow.sigma_max}
        guided: dict[str, Any] = {"guide": _load_guide(self.guide, flow, dtype), "force_guidance": self.force_guidance}
        weights: Sequence[float | None] = self.guidance or [None]
        without = () if {*weights} <= {None, 1} else (None, 1)
        return [
            SamplerSpec(
                nfe=nfe,
                gamma=gamma,
                times=None if times is None else parse_times(times, **levels),
                guidance=weight,
                solver=solver,
                **({} if weight in without else guided),
            )
            for solver in dict.fromkeys(chain.from_iterable(self.solvers)) or (None,)
            for times in self.times or (None,)
            for weight in weights
            for gamma in gammas
            for nfe in nfes
        ]


TEACHER_OPTIONS = (
    click.option(
        "--guide", metavar="SOURCE", help="Teacher: network to guide away from.  [default: itself, without classes]"
    ),
    click.option(
        "--force-guidance",
        is_flag=True,
        help="Let a teacher guide itself that was never trained without its classes.",
    ),
)
ONE_SAMPLER = (
    click.option(
        "--t",
        "times",
        metavar="LIST",
        help="Noise levels of the steps as in 80,2.5, or radians as in 1.56rad,1.1rad.",
    ),
    click.option(
        "--guidance",
        type=FiniteFloat(0, MAX_GUIDANCE),
        metavar="W",
        help="Guidance weight: 1 = none, 0 = the guide alone.  [default: 1, or the lower end of a generator's range]",
    ),
    *TEACHER_OPTIONS,
    click.option("--solver", type=Name(SOLVERS), help="Teacher, or generator of two times, as CTM's.  [default: heun]"),
)
sampler_grid_options = option_group(
    "sampler",
    SamplerGrid,
    click.option(
        "--t", "times", multiple=True, metavar="LIST", help="Noise levels of the steps, as of sample; may be repeated."
    ),
    list_option(
        "--guidance",
        "guidance",
        FiniteFloat(0, MAX_GUIDANCE),
        "1,1.2,1.4",
        "Guidance weights.  [default: 1, or the lower end of a generator's range]",
    ),
    click.option(
        "--solver",
        "solvers",
        type=NameList(SOLVERS),
        multiple=True,  # of repeated ones, click would take the last alone
        help="Teacher, or generator of two times, as CTM's.  [default: heun]",
    ),
    *TEACHER_OPTIONS,
)
sampler_options = option_group(
    "sampler",
    SamplerOptions,
    *ONE_SAMPLER,
    click.option(
        "--weights",
        type=click.Choice(["ema", "raw"]),
        default="ema",
        show_default=True,
        help="Weights of a run: the average that it publishes, or the raw weights of its newest state.",
    ),
)
"""Adds the options that say how to sample a network; the command gets them as one `sampler`, SamplerOptions."""


def _churn(**values: float) -> Churn:
    from edmdistill.sampling.heun import Churn

    return Churn(**values)


churn_options = option_group(
    "churn",
    _churn,
    click.option(
        "--churn", "strength", type=FiniteFloat(0, 1e4), default=0.0, show_default=True, help="Teacher: S_churn."
    ),
    click.option(
        "--churn-min", "sigma_min", type=FiniteFloat(0, 1e6), default=0.0, show_default=True, help="Teacher: S_min."
    ),
    click.option(
        "--churn-max",
        "sigma_max",
        type=FiniteFloat(0, infinite=True),
        default=float("inf"),
        show_default=True,
        help="Teacher: S_max.",
    ),
    click.option(
        "--churn-noise", "inflation", type=FiniteFloat(0, 10), default=1.0, show_default=True, help="Teacher: S_noise."
    ),
)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """The options of `decoding_options`, as they were typed."""

    vae: str | None
    latents: bool

    def decoder(self, model: Generator | Denoiser) -> Decoder | None:
        """Returns what turns the model's images into pictures; None where latents are kept.

        Raises: CheckpointError: the VAE is not here, or does not fit.  EdmDistillError: options that do nothing.
        """
        from edmdistill.sampling.decode import LatentDecoder, model_decoder
        from edmdistill.sampling.generate import is_latent

        if self.latents and not is_latent(model):
            raise EdmDistillError("--latents has no effect because the network works on pixels: leave it out")
        instead = "keep the latents with --latents"
        decoder = None if self.latents else model_decoder(model, self.vae, instead=instead)
        if isinstance(decoder, LatentDecoder) and decoder.note is not None:
            say(decoder.note)
        return decoder


def _decoding(vae: str | None, latents: bool) -> DecodingOptions:
    if latents and vae is not None:
        raise click.UsageError("--latents keeps latents as they are, and --vae decodes them: leave one of them out.")
    return DecodingOptions(vae=vae, latents=latents)


decoding_options = option_group(
    "decoding",
    _decoding,
    click.option(
        "--vae", metavar="DIR|ID", help="Latents: the VAE that decodes them.  [default: the checkpoint's, if cached]"
    ),
    click.option("--latents", is_flag=True, help="Latents: keep them as they are, in an .npz."),
)
"""Adds the options on a VAE's latents; the command gets them as one `decoding`, DecodingOptions."""
