"""From a recipe to a run in memory: reads the sources, checks them, builds the roles, and assembles the run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from msgspec.structs import replace
from torch import nn

from edmdistill.arguments import checked
from edmdistill.checkpoints.config import CheckpointConfig, unfinished
from edmdistill.checkpoints.load import read_first_stage, read_teacher
from edmdistill.checkpoints.noise_dependence import generator_warning
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.fit import require_fit
from edmdistill.errors import TrainingError, without_secrets
from edmdistill.machine.engine import Engine, Machine
from edmdistill.machine.environment import peak_memory
from edmdistill.methods.base import NoiseRange
from edmdistill.networks.arguments import validated
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.two_time import drop_second_time
from edmdistill.recipes.schema import Recipe
from edmdistill.torch_state import seeded
from edmdistill.training import checks
from edmdistill.training.ema import Ema, profiles
from edmdistill.training.loss_scale import LossScale
from edmdistill.training.measure import open_evaluation
from edmdistill.training.optimizers import make_optimizer
from edmdistill.training.probe import Probe
from edmdistill.training.roles import build_roles, place_networks
from edmdistill.training.run import Run
from edmdistill.training.snapshot import grid_decoder
from edmdistill.training.sources import Init, make_network, no_teacher, read_init, starts_from_init
from edmdistill.training.trackers import require_trackers


@checked
def prepare(
    recipe: Recipe,
    *,
    data: Dataset | str | Path,
    teacher: str | Path | None = None,
    guide: str | Path | None = None,
    machine: Machine = Machine(),
    force_guidance: bool = False,
    init: str | Path | None = None,
    vae: str | None = None,
) -> Run:
    """Returns a run as it is before its first step. All its processes call this together.

    Args:
        data: a data set, or a source for `open_dataset`.
        teacher: a checkpoint, ours or official. A method that makes its own network may start from one.
        guide: a checkpoint too, for a recipe whose teacher is guided by another network.
        machine: how the run uses the hardware.
        force_guidance: allows a teacher to be guided by its own classes though it was never trained without them.
        init: a generator for a warm start; see `read_init`.
        vae: what decodes latents in grids and for [evaluation]; see `open_decoder`.
    Raises: TrainingError: a teacher or guide is missing, is a generator, or does not fit the data.
        CheckpointError, DatasetError, RecipeError: from what is opened.
    """
    memory_before = peak_memory(torch.device("cpu"))
    require_trackers(machine.log_with)
    checks.require_guide(recipe, guide)
    checks.require_options(recipe, machine)
    machine = checks.with_compile_mode(recipe, machine)
    sources = read_sources(recipe, data, teacher, guide, init)
    check_sources(recipe, sources, guide, force_guidance)
    networks = build_roles(recipe, sources.flow, sources.guide and sources.guide[0], sources.init and sources.init.flow)
    notes = [] if sources.init is None else [sources.init.load_auxiliary(networks)]
    if machine.compile != "off" and "teacher" in machine.offload:
        notes.append("Frozen networks are not compiled, because they wait in the host's memory.")
    configs = sources.config, sources.guide and sources.guide[1], sources.init and sources.init.config
    named = {name: config for name, config in zip((teacher or init, guide, init), configs, strict=True) if config}
    notes += filter(None, [unfinished(config, without_secrets(str(name))) for name, config in named.items()])
    notes += filter(None, [generator_warning(sources.config.noise_dependence, teacher)])
    notes += filter(None, [checks.rounding_note(recipe, sources.flow, machine), *checks.idle_notes(recipe, machine)])
    run = assemble(recipe, sources, networks, machine)
    run.vae = vae
    run.decoder, note = run.engine.on_main(lambda: grid_decoder(run.config.encoder, vae)) or (None, None)
    run.has_grids = bool(run.engine.broadcast(run.decoder is not None))
    checks.require_samplers(run)
    run.evaluation = open_evaluation(run)
    run.notes = tuple(filter(None, [*notes, note]))
    run.memory_before = memory_before if run.engine.device.type == "cpu" else 0
    return run


class Sources(NamedTuple):
    """The sources of a run.

    Attributes:
        flow, config: the teacher; of a method that makes its own network, that network.
        guide: the network that guides the teacher, and its configuration, if there is one.
        init: a generator for a warm start.
    """

    dataset: Dataset
    flow: FlowNetwork
    config: CheckpointConfig
    guide: tuple[FlowNetwork, CheckpointConfig] | None
    init: Init | None


def read_sources(
    recipe: Recipe,
    data: Dataset | str | Path,
    teacher: str | Path | None,
    guide: str | Path | None,
    init: str | Path | None,
) -> Sources:
    """Opens the data and reads the networks; the arguments are those of `prepare`."""
    dataset = _open_data(recipe, data)
    name, warm_start = recipe.method_name, None if init is None else read_init(init, recipe)
    stages, of_steps = recipe.method_class.first_stages, recipe.method_class.stages_have_steps
    if teacher is not None:
        flow, config = read_first_stage(teacher, stages, of_steps) if stages else read_teacher(teacher)
    elif warm_start is not None and starts_from_init(recipe):
        flow, config = drop_second_time(warm_start.flow), warm_start.config
    elif recipe.network is not None:
        with seeded(recipe.training.seed):
            flow, config = make_network(recipe.network, dataset, name)
        checks.require_time_of_network(recipe, flow)
    else:
        raise no_teacher(recipe)
    return Sources(dataset, flow, config, None if guide is None else read_teacher(guide), warm_start)


def _open_data(recipe: Recipe, data: Dataset | str | Path) -> Dataset:
    """Raises: TrainingError: the recipe asks for another part of the data set than the one that is given."""
    if not isinstance(data, Dataset):
        return open_dataset(data, split=recipe.data.split, xflip=recipe.data.xflip)
    for name in ("split", "xflip"):
        given, asked = getattr(data, name), getattr(recipe.data, name)
        if given != asked:
            raise TrainingError(
                f"the data set {data.name} has {name} = {given!r}, but the recipe's [data] says {asked!r}: make it "
                f"with that, or set data.{name} in the recipe"
            )
    return data


def check_sources(recipe: Recipe, sources: Sources, guide: str | Path | None, force_guidance: bool) -> None:
    """Raises: TrainingError: the method cannot distill the teacher, or data, guide or warm start do not fit it."""
    require_fit(sources.dataset, sources.flow, sources.config)
    checks.require_stage(recipe, sources.config)
    checks.require_teacher(recipe, sources.flow, force_guidance)
    checks.require_edm_time(recipe, [sources.flow, *([] if sources.init is None else [sources.init.flow])])
    if sources.guide is not None:
        checks.require_same_latents(
            f"the guide {guide}", sources.guide[1], sources.config, "choose a guide for the same data"
        )
        checks.require_another(guide, sources.guide[0], sources.flow)
    if sources.init is not None:
        checks.require_alike(sources.init, sources.flow, sources.config)


def assemble(recipe: Recipe, sources: Sources, networks: dict[str, nn.Module], machine: Machine) -> Run:
    """Returns the run: networks on their devices, with averages and optimizers."""
    method_class, flow = recipe.method_class, sources.flow
    noise = NoiseRange.of(flow)
    trained = [name for name, role in recipe.roles.items() if role.trained]
    unused = Probe(method_class, recipe.method, networks, noise).unused()
    product = networks[method_class.product]
    assert isinstance(product, FlowNetwork)
    averages = [Ema(product, profile) for profile in profiles(recipe.ema)]

    engine = Engine(machine)
    engine.set_products(recipe.training.precision)
    engine.check_micro_batches(recipe.training.batch, recipe.group_size)
    place_networks(engine, recipe, networks)
    for average in averages:
        if "ema" not in machine.offload:
            engine.place(average.network)
    trainable = {
        role: {name: p for name, p in networks[role].named_parameters() if name not in unused[role]} for role in trained
    }
    for parameters in trainable.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    role_modules = {role: engine.wrap(network, role in trained) for role, network in networks.items()}
    for network in networks.values():
        network.requires_grad_(False)
    return Run(
        recipe=recipe,
        config=product_config(recipe, sources),
        method=method_class(recipe.method, role_modules, noise),
        networks=networks,
        role_modules=role_modules,
        trainable=trainable,
        optimizers={
            role: make_optimizer(
                parameters.values(), recipe.training.of(role), "optimizer" in machine.offload, machine.second_moment
            )
            for role, parameters in trainable.items()
        },
        scales={role: LossScale() for role in trained} if recipe.training.precision == "fp16" else {},
        averages=averages,
        dataset=sources.dataset,
        engine=engine,
    )


def product_config(recipe: Recipe, sources: Sources) -> CheckpointConfig:
    """Returns the configuration of the product's checkpoint, without images seen, average and results.

    Raises: TrainingError: no checkpoint could hold it.
    """
    config, provenance = sources.config, sources.config.provenance
    if sources.guide is not None:
        provenance = replace(provenance, guide=sources.guide[1].provenance.parent)
    if sources.init is not None:
        provenance = replace(provenance, init=sources.init.sha256)
    names = sources.dataset.label_names or ()
    has_names = sources.flow.label_dim and len(names) == sources.flow.label_dim
    levels = recipe.method_class.schedule(recipe.method, NoiseRange.of(sources.flow))
    trained = {str(len(levels)): levels} if levels else {}
    fields = msgspec.to_builtins(config) | {
        "provenance": msgspec.to_builtins(provenance),
        "stage": "teacher" if recipe.method_class.product == "teacher" else "generator",
        "method": recipe.method_name,
        "recipe_hash": recipe.hash,
        "guidance": msgspec.to_builtins(config.guidance) if recipe.method_class.first_stages else None,
        "label_names": config.label_names or (names if has_names else None),
        "trained_sigmas": levels,
        "sampling": {"sigmas": trained | recipe.sampling.sigmas, "gamma": recipe.sampling.gamma},
        "images_total": recipe.training.images,
        "noise_dependence": None,
        "results": (),
        "tunings": {},
    }
    if recipe.guidance != (1, 1):
        fields["guidance"] = {"kind": "classes" if sources.guide is None else "network", "range": recipe.guidance}
    try:
        described: CheckpointConfig = validated(fields, CheckpointConfig)
    except ValueError as error:
        raise TrainingError(
            f"checkpoints of this run could not be read again, because {error}: change the recipe or the data"
        ) from error
    return described
