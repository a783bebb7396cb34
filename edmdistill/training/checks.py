"""Checks that teacher, guide and warm start fit one another, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from msgspec import UNSET

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.encoder import LatentEncoder, latent_encoder
from edmdistill.defaults import toml
from edmdistill.errors import EdmDistillError, TrainingError
from edmdistill.machine.compile import CUDA_GRAPHS, require_compiler
from edmdistill.machine.devices import process_device
from edmdistill.machine.engine import Machine
from edmdistill.networks.flow import FlowNetwork, equal_weights
from edmdistill.networks.rounding import rounding_error
from edmdistill.recipes.schema import CompileMode, EvaluationTable, Recipe
from edmdistill.sampling.build import build_sampler
from edmdistill.sampling.spec import SamplerSpec
from edmdistill.training.run import Run
from edmdistill.training.sources import Init, teacher_problem

WARM_UPS = ("method.warmup_images", "method.trajectory_images", "method.gan_warmup_images", "training.lr_rampup_images")
"""The options after which something else begins, where a method has them."""


def require_guide(recipe: Recipe, guide: object) -> None:
    """Raises: TrainingError: the recipe needs a guide and there is none, or a guide would do nothing."""
    name, has_guide = recipe.method_name, any(role.source == "guide" for role in recipe.roles.values())
    if has_guide and guide is None:
        raise TrainingError(f"{name} uses another network as guide in this recipe: name it with --guide SOURCE")
    if guide is not None and not has_guide:
        hint = ", or add --set method.guide=network" if hasattr(recipe.method, "guide") else ""
        raise TrainingError(f"--guide has no effect: this recipe of {name} uses no guide; leave it out{hint}")


def require_options(recipe: Recipe, machine: Machine) -> None:
    """Raises: TrainingError: options exclude one another, or one does nothing in this recipe."""
    optimizer = recipe.training.optimizer
    if machine.shard and machine.offload:
        raise TrainingError("--offload does not work with --shard: leave out one of them")
    if machine.shard and optimizer == "adam8bit":
        raise TrainingError("the states of adam8bit cannot be sharded: leave out --shard, or choose another optimizer")
    if "optimizer" in machine.offload and optimizer != "adam":
        raise TrainingError(f"--offload optimizer is for adam, but the recipe uses {optimizer}: leave out one of them")
    if "teacher" in machine.offload and not any(role.frozen for role in recipe.roles.values()):
        raise TrainingError(
            f"--offload teacher has no effect: {recipe.method_name} trains all of its networks; leave teacher out"
        )
    if machine.second_moment != "fp32" and optimizer != "adam":
        raise TrainingError(
            f"--second-moment {machine.second_moment} has no effect: it is for adam, and the recipe uses {optimizer}; "
            "leave it out"
        )
    if machine.loss_pieces > 1 and not recipe.method_class.splits_loss:
        raise TrainingError(
            f"--loss-pieces has no effect: {recipe.method_name} has no loss that can be split; leave it out"
        )


def idle_notes(recipe: Recipe, machine: Machine) -> Iterator[str]:
    """Yields notes on what does nothing in this run, or on this machine, but is no mistake elsewhere."""
    images = recipe.training.images
    for name in WARM_UPS:
        table, _, key = name.partition(".")
        length = getattr(getattr(recipe, table), key, 0)
        if length > images:
            yield f"{name} = {length:,} is more than the run's {images:,} images: what it leads up to never begins."
    if machine.offload and process_device(machine.device).type == "cpu":
        yield "--offload saves nothing on a CPU, whose memory is the host's."


def compile_mode(recipe: Recipe, machine: Machine) -> CompileMode:
    """Returns the mode of torch.compile to use: the machine's if given, else the recipe's."""
    return machine.compile or recipe.training.compile or "off"


def with_compile_mode(recipe: Recipe, machine: Machine) -> Machine:
    """Returns the machine with the mode of torch.compile to use.

    Raises: EdmDistillError: see `require_compiler`.  TrainingError: --micro-batch auto with CUDA graphs.
    """
    mode = compile_mode(recipe, machine)
    if mode in CUDA_GRAPHS and machine.micro_batch == "auto":
        raise TrainingError(
            f"--micro-batch auto does not know the memory of CUDA graphs, which --compile {mode} makes: give a number "
            "of images, or use --compile default"
        )
    if mode != "off":
        require_compiler(mode, process_device(machine.device))
    return machine._replace(compile=mode)


def rounding_note(recipe: Recipe, flow: FlowNetwork, machine: Machine) -> str | None:
    """Returns a warning if half precision or TF32 spoils images at sigma_max, see `rounding_error`; or None."""
    precision = recipe.training.precision
    if precision == "tf32" and process_device(machine.device).type != "cuda":  # there it is fp32
        return None
    error = rounding_error(flow, precision, flow.sigma_max)
    if not error:
        return None
    return (
        f"Warning: the teacher predicts the noise, whose rounding in {precision} is an error of about {error:.1g} "
        f"sigma_data in images from noise level {flow.sigma_max:g}: use --set training.precision=fp32, unless the "
        "generator starts far below."
    )


def require_teacher(recipe: Recipe, flow: FlowNetwork, force_guidance: bool) -> None:
    """Raises: TrainingError: the method cannot distill this teacher, or forcing its guidance would do nothing; an
    option is a noise level that the teacher does not know.
    """
    if sentence := teacher_problem(recipe, flow, None if force_guidance else flow.label_dropout):
        raise TrainingError(sentence)
    if force_guidance and teacher_problem(recipe, flow, 0.0) is None:
        raise TrainingError(
            f"--force-guidance has no effect: in this recipe of {recipe.method_name} the teacher does not guide "
            "itself; leave it out"
        )
    options = {f"method.{name}": getattr(recipe.method, name) for name in recipe.method_class.noise_levels}
    options |= {f"sampling.sigmas.{nfe}": sigmas for nfe, sigmas in recipe.sampling.sigmas.items()}
    for name, value in options.items():
        for sigma in filter(None, value if isinstance(value, tuple) else (value,)):
            if not flow.sigma_min <= sigma <= flow.sigma_max:
                raise TrainingError(
                    f"{name} = {toml(value)}: noise level {sigma:g} is out of range; this teacher was trained "
                    f"for {flow.sigma_min:g} to {flow.sigma_max:g}"
                )


def require_stage(recipe: Recipe, config: CheckpointConfig) -> None:
    """Raises: TrainingError: a first stage was trained for other steps than the method goes on from, or is guided."""
    if config.stage != "generator":
        return
    steps = len(config.trained_sigmas)
    if steps and (problem := recipe.method_class.check_stage(recipe.method, steps)):
        raise TrainingError(f"{recipe.method_name} cannot go on from this stage: {problem}")
    if config.guidance is not None and recipe.guidance != (1, 1):
        raise TrainingError(
            f"the first stage has learned guidance, and {recipe.method_name} would guide it again: leave out "
            "method.guidance"
        )


def require_time_of_network(recipe: Recipe, flow: FlowNetwork) -> None:
    """Raises: TrainingError: the method cannot train the network that the recipe makes, because it reads ln(sigma)."""
    as_it_is, reading_t = (
        recipe.method_class.check_teacher(
            recipe.method, positional_time=time, label_dim=flow.label_dim, label_dropout=None
        )
        for time in (flow.network.positional_time, True)
    )
    if as_it_is is not None and reading_t is None:
        raise TrainingError(
            "the recipe's network reads ln(sigma), whose embedding makes continuous-time training unstable: set "
            "network.arguments.positional_time = true, or method.allow_edm_time = true"
        )


def require_edm_time(recipe: Recipe, networks: Collection[FlowNetwork]) -> None:
    """Raises: TrainingError: a recipe allows networks that read ln(sigma), and those that it starts from all read t."""
    allowed = getattr(recipe.method, "allow_edm_time", False)
    if allowed and all(flow.network.positional_time for flow in networks):
        raise TrainingError(
            "with a network whose time input is t, allow_edm_time has no effect: leave out method.allow_edm_time"
        )


def require_measured(recipe: Recipe, stop_on: Collection[str]) -> None:
    """Raises: TrainingError: a run would stop on a metric that its recipe does not measure, or on generated images that
    its method does not make.
    """
    unseen = [alarm for alarm in ("collapse", "saturation") if alarm in stop_on]
    if unseen and recipe.method_class.product == "teacher":
        raise TrainingError(
            f"--stop-on {unseen[0]} has no effect: it watches generated images, and {recipe.method_name} trains a "
            "teacher and makes none; leave it out"
        )
    if "quality" in stop_on and recipe.evaluation is UNSET:
        every = recipe.training.log_every * math.ceil(32_000 / recipe.training.log_every)
        raise TrainingError(
            "--stop-on quality needs a metric over training: add [evaluation] to the recipe, as by --set "
            f"evaluation.protocol=digits --set evaluation.every={every}"
        )


def require_samplers(run: Run) -> None:
    """Raises: TrainingError: the product cannot be sampled in a number of evaluations that the recipe asks for."""
    table = run.recipe.evaluation
    for nfe in {*run.recipe.sampling.nfe, *(table.nfe if isinstance(table, EvaluationTable) else ())}:
        try:
            build_sampler(run.model(), SamplerSpec(nfe=nfe))
        except EdmDistillError as error:
            raise TrainingError(f"the recipe's sampling.nfe or evaluation.nfe: {error}") from error


def require_same_latents(what: str, config: CheckpointConfig, teacher: CheckpointConfig, advice: str) -> None:
    """Raises: TrainingError: a network works on the latents of another VAE than the teacher."""

    def scaling(encoder: LatentEncoder | None) -> object:
        return None if encoder is None else (encoder.scale, encoder.bias, encoder.range)

    if scaling(latent_encoder(config.encoder)) != scaling(latent_encoder(teacher.encoder)):
        raise TrainingError(f"{what} uses other latents than the teacher: {advice}")


def require_another(guide: object, flow: FlowNetwork, teacher: FlowNetwork) -> None:
    """Raises: TrainingError: a guide is the teacher itself."""
    if equal_weights(flow, teacher):
        raise TrainingError(
            f"the guide {guide} has the teacher's own weights, so it has no effect: give another network as --guide, "
            "or leave it out and add --set method.guide=classes"
        )


def require_alike(init: Init, flow: FlowNetwork, config: CheckpointConfig) -> None:
    """Raises: TrainingError: a generator works on other images than the teacher."""
    for attribute in ("img_resolution", "img_channels", "label_dim", "sigma_data"):
        of_init, of_teacher = getattr(init.flow, attribute), getattr(flow, attribute)
        if of_init != of_teacher:
            raise TrainingError(
                f"{init.source} has {attribute} {of_init}, but the teacher has {of_teacher}: give a generator of the "
                "same data"
            )
    require_same_latents(init.source, init.config, config, "use a generator for the same data")
