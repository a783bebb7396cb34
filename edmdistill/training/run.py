"""What a run computes with: networks in their roles, optimisers, the average and the data, made from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from edmdistill.checkpoints.config import (
    CheckpointConfig,
    Guidance,
    NetworkSpec,
    Provenance,
    SamplingDefaults,
    describe,
)
from edmdistill.checkpoints.layout import is_state
from edmdistill.checkpoints.load import load_flow, read_teacher
from edmdistill.checkpoints.noise_dependence import generator_warning
from edmdistill.checkpoints.run_state import newest_whole_state, raw_weights
from edmdistill.checkpoints.source import open_source
from edmdistill.checkpoints.store import build_flow
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.data.latents import latent_scaling, latent_std
from edmdistill.errors import CheckpointError, RecipeError, TrainingError, without_secrets
from edmdistill.machine.engine import Engine, Machine, RoleModule, load_full_state, shard_like
from edmdistill.machine.environment import peak_memory
from edmdistill.machine.host import host_memory
from edmdistill.methods.base import Method, NoiseRange, Role
from edmdistill.networks import NETWORKS, base
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.surgery.rebuild import add_guidance, add_logvar
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time
from edmdistill.recipes.schema import Network, Recipe
from edmdistill.training.ema import Ema, profiles
from edmdistill.training.optimizers import LossScale, load_states, make_optimizer, plain_states
from edmdistill.training.probe import Probe
from edmdistill.training.stream import Stream
from edmdistill.training.trackers import require_trackers

PRECISION = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """All that a run computes with; what of it changes is its state.

    Attributes:
        config: of the product's checkpoint, without what the run itself brings about.
        roles: the networks by role, in their places; those with an optimiser are trained.
        role_modules: what the method calls for each role.
        learnt: of each trained role the parameters that its turn reaches, by name; all others are frozen for good.
        optimizers: of the parameters in `learnt`, in that order.
        scales: of the losses of each trained role, where half precision needs one.
        averages: of the product; the first is what sampling uses.
        images: seen so far.
        memory_before: bytes that the process had held at most before anything of this was made; on a GPU, none.
        notes: sentences on how the networks began.
        unproven: the trained roles, in the order of their turns, that have not yet been seen to move alone.
    """

    recipe: Recipe
    config: CheckpointConfig
    method: Method[Any]
    roles: dict[str, nn.Module]
    role_modules: dict[str, RoleModule]
    learnt: dict[str, dict[str, nn.Parameter]]
    optimizers: dict[str, torch.optim.Optimizer]
    scales: dict[str, LossScale]
    averages: list[Ema]
    dataset: Dataset
    engine: Engine
    images: int = 0
    memory_before: int = 0
    notes: tuple[str, ...] = ()
    unproven: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.unproven = [turn.role for turn in sorted(self.method.turns(), key=lambda turn: turn.begins)]

    @property
    def ema(self) -> Ema:
        """The average that grids show and that generator/ holds."""
        return self.averages[0]

    @property
    def identity(self) -> dict[str, Any]:
        """What beside the recipe must not change between a run and its resumption."""
        data, origin = self.dataset, self.config.provenance
        return {
            "teacher_sha256": origin.parent,
            **({} if origin.guide is None else {"guide_sha256": origin.guide}),
            **({} if origin.init is None else {"init_sha256": origin.init}),
            "data": {
                "name": Path(data.name).name,
                "images": len(data),
                "resolution": data.img_resolution,
                "channels": data.img_channels,
                "classes": data.label_dim,
                "content_sha256": data.content_sha256,
                "labels_sha256": data.labels_sha256,
            },
        }

    def plan(self) -> dict[str, Any]:
        """What would be trained, as plain values."""
        return {
            "schema_version": 1,
            "recipe": self.recipe.tables(),
            "recipe_hash": self.recipe.hash,
            "roles": {
                role: {
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "trained": role in self.optimizers,
                    "two_time": self.recipe.roles[role].two_time,
                    "unused": self.unused(role),
                }
                for role, network in self.roles.items()
            },
            "device": str(self.engine.device),
            "processes": self.engine.world_size,
            "micro_batch": self.engine.machine.micro_batch,
            **self.identity,
        }

    def stream(self) -> Stream:
        """The training data, from anywhere."""
        return Stream(
            self.dataset,
            seed=self.recipe.training.seed,
            labels=bool(self.ema.network.label_dim),
            statistics=latent_scaling(self.config.encoder),
            workers=self.engine.machine.workers,
            device=self.engine.device,
        )

    @property
    def kept(self) -> list[str]:
        """The roles that are in a state: all but the teacher."""
        return [role for role, part in self.recipe.roles.items() if not part.frozen]

    def unused(self, role: str) -> list[str]:
        """Parameters of a trained role that the loss of its turn does not reach."""
        if role not in self.learnt:
            return []
        return [name for name, _ in self.roles[role].named_parameters() if name not in self.learnt[role]]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights of each role but the teacher, optimiser states, and the averages: whole, whatever the sharding.

        All processes call it together; it is empty but on the main one.
        """
        groups = {f"ema-{average.profile.name}": average.network.state_dict() for average in self.averages}
        for role in self.kept:
            groups[role] = {f"weights.{name}": tensor for name, tensor in self.roles[role].state_dict().items()}
        for role, optimizer in self.optimizers.items():
            names = list(self.learnt[role])
            for index, values in plain_states(optimizer).items():
                groups[role] |= {f"{key}.{names[index]}": value for key, value in values.items()}
        return {name: self.engine.gather(tensors) for name, tensors in groups.items()}

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], images: int) -> None:
        """Puts back what `state` gave."""
        self.images = images
        for average in self.averages:
            load_full_state(average.network, groups[f"ema-{average.profile.name}"])
        for role in self.kept:
            learnt = self.learnt.get(role, {})
            index = {name: i for i, name in enumerate(learnt)}
            weights: dict[str, Tensor] = {}
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in groups[role].items():
                kind, _, parameter = name.partition(".")
                if kind == "weights":
                    weights[parameter] = tensor
                else:
                    state.setdefault(index[parameter], {})[kind] = shard_like(tensor, learnt[parameter])
            load_full_state(self.roles[role], weights)
            if role in self.optimizers:
                load_states(self.optimizers[role], state)


def prepare(
    recipe: Recipe,
    *,
    data: str | Path,
    teacher: str | Path | None = None,
    guide: str | Path | None = None,
    machine: Machine = Machine(),
    force_guidance: bool = False,
    init: str | Path | None = None,
) -> Run:
    """Everything in memory, as it is before the first step. All processes of a run call it.

    Args:
        data: what `open_dataset` takes.
        teacher: a checkpoint, ours or official; a method that makes its own network takes one to start from, or none.
        guide: a checkpoint too, for a recipe by which another network guides the teacher.
        machine: how the run uses the hardware.
        force_guidance: let a teacher guide itself by its classes that was never trained without them.
        init: a generator, of which the run's own starts as a copy; see `read_init`.
    Raises: TrainingError: no teacher or guide where there must be one, a generator in its place, or a guide or data
            that do not fit.
        CheckpointError, DatasetError, RecipeError: from what is opened.
    """
    method_class = recipe.method_class
    memory_before = peak_memory(torch.device("cpu"))
    require_trackers(machine.log_with)
    if machine.shard and recipe.training.optimizer == "adam8bit":
        raise TrainingError("the states of adam8bit are not shared out: take --shard or adam8bit")
    require_guide(recipe, guide)
    dataset = open_dataset(data, split=recipe.data.split, xflip=recipe.data.xflip)
    begin = None if init is None else read_init(init, recipe)
    if teacher is not None:
        flow, config = read_teacher(teacher)
    elif begin is not None and not any(part.frozen for part in recipe.roles.values()):
        flow, config = drop_second_time(begin.flow), begin.config
    elif recipe.network is not None:
        torch.manual_seed(recipe.training.seed)
        flow, config = _make(recipe.network, dataset, recipe.method_name)
    else:
        name = recipe.method_name
        raise TrainingError(f"{name} starts from a teacher: name its checkpoint, edmdistill train {name} TEACHER ...")
    require_fit(dataset, flow, config)
    check_teacher = method_class.check_teacher(
        recipe.method,
        positional_time=flow.network.positional_time,
        label_dim=flow.label_dim,
        label_dropout=None if force_guidance else flow.label_dropout,
    )
    if check_teacher is not None:
        raise TrainingError(check_teacher)

    noise = NoiseRange(flow.sigma_data, flow.sigma_min, flow.sigma_max)
    other, guidance = None, None
    if recipe.guidance != (1, 1):
        guidance = Guidance("classes" if guide is None else "network", recipe.guidance)
    if guide is not None:
        other, its = read_teacher(guide)
        if latent_scaling(its.encoder) != latent_scaling(config.encoder):
            raise TrainingError(f"the guide {guide} works on other latents than the teacher: choose one of its kind")
        config = replace(config, provenance=replace(config.provenance, guide=its.provenance.parent))
    if begin is not None:
        require_alike(begin, flow, config)
        config = replace(config, provenance=replace(config.provenance, init=begin.sha256))
    roles = build_roles(recipe, flow, other, begin.flow if begin is not None else None)
    notes: tuple[str, ...] = () if begin is None else (begin.take_auxiliary(roles),)
    warning = generator_warning(config.noise_dependence, teacher)
    notes += () if warning is None else (warning,)
    trained = [role for role, part in recipe.roles.items() if part.trained]
    unused = Probe(method_class, recipe.method, roles, noise).unused()
    product = roles[method_class.product]
    assert isinstance(product, FlowNetwork)
    averages = [Ema(product, profile) for profile in profiles(recipe.ema)]

    engine = Engine(machine)
    engine.check_micro_batches(recipe.training.batch)
    for role, network in roles.items():
        if isinstance(network, FlowNetwork) and recipe.roles[role].frozen and "teacher" in machine.offload:
            engine.offload(network)
        else:
            engine.place(network)
        # After `offload`: a block that is computed again needs its weights again.
        if machine.checkpointing and isinstance(network, FlowNetwork):
            network.network.checkpoint_blocks()
    for average in averages:
        if "ema" not in machine.offload:
            engine.place(average.network)
    learnt = {
        role: {name: p for name, p in roles[role].named_parameters() if name not in unused[role]} for role in trained
    }
    for parameters in learnt.values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    role_modules = {role: engine.wrap(network, role in trained) for role, network in roles.items()}
    for network in roles.values():
        network.requires_grad_(False)
    return Run(
        recipe=recipe,
        config=replace(
            config,
            stage="teacher" if method_class.product == "teacher" else "generator",
            method=recipe.method_name,
            recipe_hash=recipe.hash,
            guidance=guidance,
            label_names=config.label_names or _names(dataset, flow.label_dim),
            sampling=SamplingDefaults(recipe.sampling.sigmas, recipe.sampling.gamma),
            images_total=recipe.training.images,
            noise_dependence=None,
            results=(),
        ),
        method=method_class(recipe.method, role_modules, noise),
        roles=roles,
        role_modules=role_modules,
        learnt=learnt,
        optimizers={
            role: make_optimizer(parameters.values(), recipe.training, "optimizer" in machine.offload)
            for role, parameters in learnt.items()
        },
        scales={role: LossScale() for role in trained} if recipe.training.precision == "fp16" else {},
        averages=averages,
        dataset=dataset,
        engine=engine,
        memory_before=memory_before if engine.device.type == "cpu" else 0,
        notes=notes,
    )


def set_trainable(run: Run, role: str) -> None:
    """Makes ready for a turn of `role`: its network learns, all others are frozen."""
    for other, network in run.roles.items():
        if network.training != (other == role):
            network.train(other == role)
            for parameter in run.learnt.get(other, {}).values():
                parameter.requires_grad_(other == role)


def sketch(table: Network, dataset: Dataset) -> FlowNetwork:
    """Returns the network that a recipe describes, for these data, on the meta device.

    Raises: RecipeError: its arguments make none, or it would not fit into the host's memory.
    """
    names = ("img_channels",) if table.kind == "edm2" else ("in_channels", "out_channels")
    shape = {"img_resolution": dataset.img_resolution, "label_dim": dataset.label_dim}
    spec = NetworkSpec(table.kind, shape | dict.fromkeys(names, dataset.img_channels) | table.arguments)
    reads = "time" if table.arguments.get("positional_time") else "log_sigma"
    try:
        flow = build_flow(spec, {"kind": "edm", "sigma_data": table.sigma_data, "c_noise_kind": reads}, "[network]")
    except CheckpointError as error:
        raise RecipeError(f"[network.arguments] make no {table.kind} network: {error}") from error
    parameters, memory = sum(p.numel() for p in flow.parameters()), host_memory()[0]
    if 4 * parameters > memory:
        raise RecipeError(
            f"[network.arguments] make a network of {parameters:,} parameters, more than the {memory / 1e9:.0f} GB of "
            "this machine hold: make it smaller"
        )
    return flow


def _make(table: Network, dataset: Dataset, method: str) -> tuple[FlowNetwork, CheckpointConfig]:
    """A network that fits the data, with fresh weights, and its configuration."""
    dataset.require_labels_from_zero()
    drawn = sketch(table, dataset)
    make: Callable[..., base.Network] = NETWORKS[table.kind]
    flow = FlowNetwork(make(**drawn.network.arguments), drawn.preconditioning)
    provenance = Provenance(source=f"a network trained by {method} on {Path(dataset.name).name}")
    return flow, CheckpointConfig(stage="teacher", provenance=provenance, **describe(flow))


def require_guide(recipe: Recipe, guide: object) -> None:
    """Lets a guide be given exactly where a role of the recipe is made from it.

    Raises: TrainingError: it is missing, or would do nothing.
    """
    name, wanted = recipe.method_name, any(part.source == "guide" for part in recipe.roles.values())
    if wanted and guide is None:
        raise TrainingError(f"{name} guides its teacher by another network here: name its checkpoint, --guide SOURCE")
    if guide is not None and not wanted:
        hint = ", or say --set method.guide=network" if hasattr(recipe.method, "guide") else ""
        raise TrainingError(f"--guide would do nothing: by this recipe of {name} no network guides; leave it out{hint}")


def build_roles(
    recipe: Recipe, teacher: FlowNetwork, guide: FlowNetwork | None = None, init: FlowNetwork | None = None
) -> dict[str, nn.Module]:
    """Returns the networks of all roles.

    Args:
        init: what the product, and the averages that follow it, start as; None: the teacher.
    Raises: TrainingError: a guide of other data than the teacher's.
    """
    for what in ("img_resolution", "img_channels", "sigma_data", "label_dim") if guide is not None else ():
        ours, theirs = getattr(teacher, what), getattr(guide, what)
        if ours != theirs and (what, theirs) != ("label_dim", 0):
            raise TrainingError(
                f"the guide's {what} is {theirs}, but the teacher's is {ours}: choose a guide of the same data"
            )
    sources = {"teacher": teacher, "guide": guide or teacher}
    product = recipe.method_class.product
    networks = {}
    for role, part in recipe.roles.items():
        is_product = product in (role, part.ema_of.role if part.ema_of is not None else None)
        networks[role] = build_role(part, init if init is not None and is_product else sources[part.source], recipe)
    return networks


class Init(NamedTuple):
    """A generator that a run begins with.

    Attributes:
        source: as the user named it.
        auxiliary: weights of the auxiliary score that was trained with it, where they are known.
    """

    source: str
    flow: FlowNetwork
    config: CheckpointConfig
    sha256: str
    auxiliary: dict[str, Tensor]

    def take_auxiliary(self, roles: Mapping[str, nn.Module]) -> str:
        """Puts the auxiliary score in its role, if it fits.  Returns: a sentence on how the run begins."""
        seen = f" after {self.config.images_seen:,} images" if self.config.images_seen is not None else ""
        sentence = f"The generator starts as {self.source}, of {self.config.method}{seen}"
        auxiliary = roles.get("auxiliary")
        if not isinstance(auxiliary, FlowNetwork):
            return f"{sentence}."
        own = auxiliary.network.state_dict()
        if {name: tensor.shape for name, tensor in own.items()} != {k: v.shape for k, v in self.auxiliary.items()}:
            return f"{sentence}; the auxiliary score starts as the teacher."
        auxiliary.network.load_state_dict(self.auxiliary)
        return f"{sentence}, and the auxiliary score as the one that was trained with it."


def read_init(source: str | Path, recipe: Recipe) -> Init:
    """Returns a generator for a recipe to begin with.

    Args:
        source: a checkpoint, a run directory, whose average is taken, or one of its states, whose raw weights are; of
            the last two the auxiliary score is taken too.
    Raises: TrainingError: it is no generator, or not one that the method's generator can start as.
        CheckpointError: it cannot be read.
    """
    name, product = recipe.method_name, recipe.method_class.product
    if product == "teacher":
        raise TrainingError(f"{name} trains a teacher, which starts as TEACHER: leave --init out")
    given = open_source(source)
    path = given.path
    flow, config = load_flow(given)
    if config.stage != "generator":
        raise TrainingError(f"{source} is a {config.stage}, not a generator: give it as TEACHER, and leave --init out")
    part, state = recipe.roles[product], None
    if flow.two_time and not part.two_time:
        raise TrainingError(
            f"{source} is a generator of {config.method}, which reads two times, but that of {name} reads one: give a "
            "generator of another method, or leave --init out"
        )
    if flow.guided and not part.guided:
        raise TrainingError(
            f"{source} reads a weight of guidance, but the generator of this recipe does not: give --set "
            f"method.guidance={list(config.guidance.range) if config.guidance else []}, or leave --init out"
        )
    check_teacher = recipe.method_class.check_teacher(
        recipe.method,
        positional_time=flow.network.positional_time,
        label_dim=flow.label_dim,
        label_dropout=None,
    )
    if check_teacher is not None:
        raise TrainingError(f"--init {source}: {check_teacher}")
    if is_state(path) or (path / "state").is_dir():
        state = newest_whole_state(path, lambda sentence: None)
    known = state is not None and (state / "auxiliary.safetensors").is_file()
    auxiliary = raw_weights(state, "auxiliary") if state is not None and known else {}
    return Init(without_secrets(str(source)), flow, config, given.sha256, auxiliary)


def require_alike(init: Init, flow: FlowNetwork, config: CheckpointConfig) -> None:
    """Lets a generator through that works on the teacher's images.  Raises: TrainingError: it works on others."""
    for what in ("img_resolution", "img_channels", "label_dim", "sigma_data"):
        own, wanted = getattr(init.flow, what), getattr(flow, what)
        if own != wanted:
            raise TrainingError(
                f"{init.source} has {what} {own}, but the teacher has {wanted}: give a generator of the same data"
            )
    if latent_scaling(init.config.encoder) != latent_scaling(config.encoder):
        raise TrainingError(f"{init.source} works on other latents than the teacher: give a generator of the same data")


def build_role(part: Role, flow: FlowNetwork, recipe: Recipe) -> nn.Module:
    """The network that plays a part: a copy of `flow`, with the times, heads and weight that it asks for, or made."""
    if part.make is not None:
        return part.make(flow, recipe.training.seed).to(flow.dtype).requires_grad_(False).eval()
    network = add_second_time(flow) if part.two_time else drop_second_time(flow)
    if part.logvars:
        network = add_logvar(network, recipe.training.seed, part.logvars)
    if part.guided:
        network = add_guidance(network)
    network.compute_dtype = PRECISION[recipe.training.precision]
    network.requires_grad_(False).eval()
    if part.frozen:
        network.network.fold()
    elif recipe.training.dropout is not None:
        set_dropout(network, recipe.training.dropout, recipe.training.dropout_max_resolution)
    return network


def set_dropout(network: FlowNetwork, dropout: float, max_resolution: int | None) -> None:
    """Dropout in the blocks of features up to max_resolution pixels a side, None: in all; none in the others.

    Source: sCM, appendix G.2.
    """
    for name, block in network.named_modules():
        if hasattr(block, "dropout"):
            resolution = int(name.rpartition(".")[2].partition("x")[0])  # official names: enc.16x16_block0
            block.dropout = dropout if max_resolution is None or resolution <= max_resolution else 0.0


def _names(dataset: Dataset, label_dim: int) -> tuple[str, ...] | None:
    """The data's names of the network's classes, if there is one for each."""
    names = dataset.label_names or ()
    return tuple(names) if label_dim and len(names) == label_dim else None


def require_fit(dataset: Dataset, flow: FlowNetwork, config: CheckpointConfig) -> None:
    """Lets data through that the network takes, and counts its classes as the network does.

    Raises: TrainingError: their shape is another.  DatasetError: they have no classes, or others than the network.
    """

    def words(latent: bool, size: int, channels: int, classes: int) -> str:
        what, plural = "latents" if latent else "images", "s" if channels > 1 else ""
        return f"{what} of {size}x{size} with {channels} channel{plural} and {classes or 'no'} classes"

    has = dataset.latent, dataset.img_resolution, dataset.img_channels
    needs = latent_scaling(config.encoder) is not None, flow.img_resolution, flow.img_channels
    if has != needs:
        raise TrainingError(
            f"the data {dataset.name} are {words(*has, dataset.label_dim)}, but the network takes "
            f"{words(*needs, flow.label_dim)}: give those"
        )
    dataset.use_classes(flow.label_dim, config.label_names)
    statistics = latent_scaling(config.encoder)
    if statistics is not None:
        found = latent_std(dataset.tensors(range(0, len(dataset), max(1, len(dataset) // 64)))[0], statistics)
        if not 1 / 3 < found / flow.sigma_data < 3:
            dataset.note(
                f"{dataset.name}: latents have a standard deviation of {found:.3g} by the teacher's scale, which was "
                f"trained on {flow.sigma_data:g}: they were scaled already, or are of another VAE."
            )
