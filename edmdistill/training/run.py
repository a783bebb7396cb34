"""What a run computes with: networks in their roles, optimisers, the average and the data, made from a recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec.structs import replace
from torch import Tensor

from edmdistill.checkpoints.convert import read_source
from edmdistill.checkpoints.source import resolve
from edmdistill.checkpoints.store import CONFIG, MODEL, CheckpointConfig, Provenance, Sampling, facts, load_checkpoint
from edmdistill.data.datasets import Dataset, open_dataset
from edmdistill.errors import RecipeError, TrainingError
from edmdistill.methods.base import Method, NoiseRange, Role
from edmdistill.networks import NETWORKS
from edmdistill.networks.preconditioning import EDM, FlowNetwork
from edmdistill.networks.two_time import add_second_time, drop_second_time
from edmdistill.recipes import Network, Recipe
from edmdistill.training.ema import Ema

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Run:
    """All that a run computes with; what of it changes is its state.

    Attributes:
        config: of the product's checkpoint, without what the run itself brings about.
        roles: the networks by role; those with an optimiser are trained.
        ema: the average of the product.
        images: seen so far.
    """

    recipe: Recipe
    config: CheckpointConfig
    method: Method
    roles: dict[str, FlowNetwork]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema
    dataset: Dataset
    device: torch.device
    images: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What beside the recipe must not change between a run and its resumption."""
        data = self.dataset
        return {
            "teacher_sha256": self.config.provenance.parent,
            "data": {
                "name": Path(data.name).name,
                "images": len(data),
                "resolution": data.img_resolution,
                "channels": data.img_channels,
                "classes": data.label_dim,
            },
        }

    def plan(self) -> dict[str, Any]:
        """What would be trained, as plain values."""
        return {
            "schema_version": 1,
            "recipe": msgspec.to_builtins(self.recipe),
            "recipe_hash": self.recipe.hash,
            "roles": {
                role: {
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "trained": role in self.optimizers,
                    "two_time": network.two_time,
                }
                for role, network in self.roles.items()
            },
            "device": str(self.device),
            **self.identity,
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights and optimiser state of each trained role, and the average."""
        groups = {"ema": self.ema.network.state_dict()}
        for role, optimizer in self.optimizers.items():
            names = [name for name, _ in self.roles[role].named_parameters()]
            groups[role] = {f"weights.{name}": tensor for name, tensor in self.roles[role].state_dict().items()}
            for index, values in optimizer.state_dict()["state"].items():
                groups[role] |= {f"{key}.{names[index]}": value for key, value in values.items()}
        return groups

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], images: int) -> None:
        """Puts back what `state` gave."""
        self.images = images
        self.ema.network.load_state_dict(groups["ema"])
        for role, optimizer in self.optimizers.items():
            index = {name: i for i, (name, _) in enumerate(self.roles[role].named_parameters())}
            weights: dict[str, Tensor] = {}
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in groups[role].items():
                kind, _, parameter = name.partition(".")
                if kind == "weights":
                    weights[parameter] = tensor
                else:
                    state.setdefault(index[parameter], {})[kind] = tensor
            self.roles[role].load_state_dict(weights)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def prepare(recipe: Recipe, *, data: str | Path, teacher: str | Path | None = None, device: str | None = None) -> Run:
    """Everything in memory, as it is before the first step.

    Args:
        data: what `open_dataset` takes.
        teacher: a checkpoint, ours or official; a method that makes its own network takes one to start from, or none.
        device: default: cuda where there is one, else cpu.
    Raises: TrainingError: no teacher for a method that needs one, or a generator in its place, or data that do not fit.
        CheckpointError, DatasetError, RecipeError: from what is opened.
    """
    method_class = recipe.method_class
    dataset = open_dataset(data, split=recipe.data.split)
    if teacher is not None:
        flow, config = _read(teacher)
    elif recipe.network is not None:
        torch.manual_seed(recipe.training.seed)
        flow, config = _make(recipe.network, dataset)
    else:
        name = recipe.method["name"]
        raise TrainingError(f"{name} distils a teacher: name its checkpoint, edmdistill train {name} TEACHER ...")
    _require_fit(dataset, flow, config)

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    roles = {role: _cast(part, flow, recipe).to(place) for role, part in method_class.roles.items()}
    training = recipe.training
    trained = [role for role, part in method_class.roles.items() if part.trained]
    product = roles[method_class.product]
    return Run(
        recipe=recipe,
        config=replace(
            config,
            stage="teacher" if method_class.product == "teacher" else "generator",
            method=recipe.method["name"],
            recipe_hash=recipe.hash,
            label_names=config.label_names or (tuple(dataset.label_names) if dataset.label_names else None),
            sampling=Sampling(recipe.sampling.sigmas, recipe.sampling.gamma),
            results=(),
        ),
        method=method_class(recipe.method_config, roles, NoiseRange(flow.sigma_data, flow.sigma_min, flow.sigma_max)),
        roles=roles,
        optimizers={
            role: torch.optim.Adam(
                roles[role].parameters(), lr=training.lr, betas=training.betas, eps=training.eps, fused=True
            )
            for role in trained
        },
        ema=Ema(product, recipe.ema.half_life_images, recipe.ema.rampup_ratio),
        dataset=dataset,
        device=place,
    )


def _read(source: str | Path) -> tuple[FlowNetwork, CheckpointConfig]:
    """A teacher and its configuration, as parent of what comes from it; of a run directory, the one trained there."""
    path = resolve(source)
    if path.is_dir():
        path = path / "generator" if (path / "generator" / CONFIG).is_file() else path
        flow, config = load_checkpoint(path)
    else:
        flow, config = read_source(path)
    if config.stage != "teacher":
        raise TrainingError(f"{source} is a {config.stage}, made by {config.method}: give its teacher")
    with (path / MODEL if path.is_dir() else path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return flow, replace(config, provenance=replace(config.provenance, parent=sha256))


def _make(table: Network, dataset: Dataset) -> tuple[FlowNetwork, CheckpointConfig]:
    """A network that fits the data, with fresh weights, and its configuration."""
    arguments = {
        "img_resolution": dataset.img_resolution,
        "img_channels": dataset.img_channels,
        "label_dim": dataset.label_dim,
    } | table.arguments
    try:
        network = NETWORKS[table.kind](**arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"[network.arguments] make no {table.kind} network: {error}") from error
    flow = FlowNetwork(network, EDM(sigma_data=table.sigma_data))
    provenance = Provenance(source=f"edmdistill train diffusion on {Path(dataset.name).name}")
    return flow, CheckpointConfig(stage="teacher", provenance=provenance, **facts(flow))


def _cast(part: Role, flow: FlowNetwork, recipe: Recipe) -> FlowNetwork:
    """The network that plays a part: a copy of the teacher, of as many times as the part reads."""
    network = add_second_time(flow) if part.two_time else drop_second_time(flow)
    network.compute_dtype = PRECISION[recipe.training.precision]
    network.requires_grad_(False).eval()
    if not part.trained:
        network.network.fold()
    elif recipe.training.dropout is not None:
        for module in network.modules():
            if hasattr(module, "dropout"):
                module.dropout = recipe.training.dropout  # type: ignore[assignment]
    return network


def _require_fit(dataset: Dataset, flow: FlowNetwork, config: CheckpointConfig) -> None:
    def words(size: int, channels: int, classes: int) -> str:
        return f"{size}x{size} with {channels} channels and {classes or 'no'} classes"

    has = dataset.img_resolution, dataset.img_channels, dataset.label_dim if flow.label_dim else 0
    needs = flow.img_resolution, flow.img_channels, flow.label_dim
    if has != needs:
        what = "images" if config.encoder["kind"] == "pixels" else "latents"
        raise TrainingError(
            f"the data {dataset.name} are {words(*has)}, but the network takes {what} of {words(*needs)}: give those"
        )
