"""Networks that a run starts from in place of a teacher: one made for the data, or a generator for a warm start."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edmdistill.checkpoints.config import CheckpointConfig, NetworkSpec, Provenance, describe
from edmdistill.checkpoints.encoder import PIXELS
from edmdistill.checkpoints.layout import is_state
from edmdistill.checkpoints.load import load_flow
from edmdistill.checkpoints.run_state import newest_whole_state, raw_weights
from edmdistill.checkpoints.source import open_source
from edmdistill.checkpoints.store import build_flow
from edmdistill.data.datasets import Dataset
from edmdistill.errors import Damaged, RecipeError, TrainingError, counted, without_secrets
from edmdistill.machine.host import host_memory
from edmdistill.networks import NETWORKS, base, image_arguments
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.preconditioning import EDM
from edmdistill.recipes.schema import NetworkTable, Recipe


def sketch(table: NetworkTable, dataset: Dataset) -> FlowNetwork:
    """Returns the network that a recipe describes, for these data, on the meta device.

    Raises: RecipeError: its arguments make no network, or one that does not fit into the host's memory.
    """
    shape = image_arguments(table.kind, dataset.img_resolution, dataset.img_channels, dataset.label_dim)
    spec = NetworkSpec(table.kind, shape | table.arguments)
    reads = "time" if table.arguments.get("positional_time") else "log_sigma"
    try:
        numbers = {"kind": "edm", "sigma_data": table.sigma_data, "c_noise_kind": reads}
        flow = build_flow(spec, numbers, "[network]")
    except Damaged as error:
        raise RecipeError(f"{error.fault}: change the recipe's table [network]") from error
    parameters, memory = sum(p.numel() for p in flow.parameters()), host_memory()[0]
    if 4 * parameters > memory:
        raise RecipeError(
            f"[network.arguments] make a network of {parameters:,} parameters, too large for the {memory / 1e9:.0f} GB "
            "of this machine: make it smaller"
        )
    return flow


def make_network(table: NetworkTable, dataset: Dataset, method: str) -> tuple[FlowNetwork, CheckpointConfig]:
    """Returns a network that fits the data, with random weights, and its configuration."""
    dataset.require_clear_classes()
    if dataset.latent and dataset.encoding is None:
        raise TrainingError(
            f"{dataset.name} does not say which VAE made its latents, and a network made for them must know it: encode "
            "the images by `edmdistill data encode`"
        )
    shapes = sketch(table, dataset)
    make: Callable[..., base.Network] = NETWORKS[table.kind]
    flow = FlowNetwork(make(**shapes.network.arguments), shapes.preconditioning)
    provenance = Provenance(source=f"a network trained by {method} on {Path(dataset.name).name}")
    encoder = PIXELS if dataset.encoding is None else dataset.encoding.encoder(flow.sigma_data)
    return flow, CheckpointConfig(stage="teacher", provenance=provenance, encoder=dict(encoder), **describe(flow))


class Init(NamedTuple):
    """A generator for a warm start.

    Attributes:
        source: as the user named it.
        auxiliary: weights of the auxiliary score that was trained with it; empty if there are none.
    """

    source: str
    flow: FlowNetwork
    config: CheckpointConfig
    sha256: str
    auxiliary: dict[str, Tensor]

    def load_auxiliary(self, networks: Mapping[str, nn.Module]) -> str:
        """Loads the auxiliary score into its role, if it fits.  Returns: a sentence on how the run starts."""
        seen = f" after {counted(self.config.images_seen, 'image')}" if self.config.images_seen is not None else ""
        sentence = f"The generator starts as {self.source}, of {self.config.method}{seen}"
        auxiliary = networks.get("auxiliary")
        if not isinstance(auxiliary, FlowNetwork):
            return f"{sentence}."
        mine = auxiliary.network.state_dict()
        if _shapes(mine) != _shapes(self.auxiliary):
            return f"{sentence}; the auxiliary score starts as the teacher."
        fitting = {name: tensor for name, tensor in self.auxiliary.items() if name in mine}
        auxiliary.network.load_state_dict(mine | fitting)
        return f"{sentence}, and the auxiliary score as the one that was trained with it."


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Returns the shapes of a score's tensors, without those of a head, which only an adversary has."""
    return {name: tensor.shape for name, tensor in tensors.items() if not name.startswith("head.")}


def starts_from_init(recipe: Recipe) -> bool:
    """Returns whether a run needs no teacher beside a generator to start from: none of its networks stays the same."""
    return not any(role.frozen for role in recipe.roles.values())


def no_teacher(recipe: Recipe) -> TrainingError:
    """Returns the error of a run that has nothing to start from."""
    name = recipe.method_name
    instead = ", or let the recipe make its network, by a table [network]" if starts_from_init(recipe) else ""
    return TrainingError(f"{name} needs a teacher: name its checkpoint, edmdistill train {name} TEACHER ...{instead}")


def read_init(source: str | Path, recipe: Recipe) -> Init:
    """Returns a generator for a recipe to start from.

    Args:
        source: a checkpoint; a run directory, for its average; or one of its states, for the raw weights. The last two
            have the auxiliary score too.
    Raises: TrainingError: it is no generator, or not one that the method can start from.
        CheckpointError: it cannot be read.
    """
    name, product = recipe.method_name, recipe.method_class.product
    if product == "teacher":
        raise TrainingError(f"{name} trains a teacher and starts from TEACHER: leave --init out")
    given = open_source(source)
    path = given.path
    flow, config = load_flow(given)
    if config.stage != "generator":
        raise TrainingError(f"{source} is a {config.stage}, not a generator: pass it as TEACHER, and leave --init out")
    _check_init(source, flow, config, recipe)
    has_states = is_state(path) or (path / "state").is_dir()
    state = newest_whole_state(path, lambda sentence: None) if has_states else None
    auxiliary = {}
    if state is not None and (state / "auxiliary.safetensors").is_file():
        auxiliary = raw_weights(state, "auxiliary")
    return Init(without_secrets(str(source)), flow, config, given.sha256, auxiliary)


def teacher_problem(recipe: Recipe, flow: FlowNetwork, label_dropout: float | None) -> str | None:
    """Returns why the method cannot distill a network, as a sentence with a fix that works for this one, or None.

    Args:
        label_dropout: as of `Method.check_teacher`.
    """

    def problem(reads_time: bool) -> str | None:
        return recipe.method_class.check_teacher(
            recipe.method, positional_time=reads_time, label_dim=flow.label_dim, label_dropout=label_dropout
        )

    found = problem(flow.network.positional_time)
    if found is None or isinstance(flow.preconditioning, EDM) or found == problem(True):
        return found
    return (
        f"the teacher has {type(flow.preconditioning).__name__}'s preconditioning, which makes continuous-time "
        "training unstable, and cannot be made to read t: use an EDM or EDM2 teacher, or "
        "--set method.allow_edm_time=true"
    )


def _check_init(source: str | Path, flow: FlowNetwork, config: CheckpointConfig, recipe: Recipe) -> None:
    """Raises: TrainingError: the recipe's generator cannot start as this one."""
    role = recipe.roles[recipe.method_class.product]
    if flow.two_time and not role.two_time:
        raise TrainingError(
            f"{source} is a generator of {config.method}, which reads two times, but {recipe.method_name}'s "
            "generator reads one: give a generator of another method, or leave --init out"
        )
    if flow.guided and not role.guided:
        advice = "give a generator that reads none"
        if config.guidance is not None and hasattr(recipe.method, "guidance"):
            low, high = config.guidance.range
            advice = f"add --set {shlex.quote(f'method.guidance=[{low:g},{high:g}]')}"
        raise TrainingError(
            f"{source} reads a guidance weight, but this recipe's generator does not: {advice}, or leave --init out"
        )
    if (problem := teacher_problem(recipe, flow, None)) is not None:
        raise TrainingError(f"{source} reads what its teacher read, and {problem}, or leave --init out")
