"""A run in memory: networks in their roles, optimizers, averages and data, and the state that it resumes from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edmdistill.checkpoints.config import CheckpointConfig
from edmdistill.checkpoints.encoder import latent_encoder
from edmdistill.checkpoints.generator import Generator
from edmdistill.data.datasets import Dataset
from edmdistill.machine.engine import Engine, RoleModule, load_full_state, shard_like
from edmdistill.machine.environment import usage
from edmdistill.methods.base import Method
from edmdistill.networks.flow import Denoiser
from edmdistill.networks.magnitude import EffectiveWeights
from edmdistill.recipes.schema import Recipe
from edmdistill.sampling.decode import Decoder
from edmdistill.sampling.grid import to_uint8
from edmdistill.training.ema import Ema
from edmdistill.training.loss_scale import LossScale
from edmdistill.training.optimizers import load_states, plain_states
from edmdistill.training.roles import effective_weights, shared_weights
from edmdistill.training.stream import Stream

if TYPE_CHECKING:
    from edmdistill.training.measure import Evaluation


@dataclass
class Run:
    """All that a run computes with. `state` is the part of it that changes.

    Attributes:
        config: of the product's checkpoint, without images seen, average and results.
        networks: by role, on their devices. Those with an optimizer are trained.
        role_modules: what the method calls for each role.
        trainable: of each trained role, the parameters that its loss reaches, by name. All others are always frozen.
        optimizers: of the parameters in `trainable`, in that order.
        scales: loss scales of the trained roles, in fp16 alone.
        averages: of the product. Sampling uses the first.
        images: seen so far.
        decoder: from the product's images to pictures, on the main process alone.
        vae: folder or Hub id of the VAE that was asked for; None: the one that the product's encoder names.
        has_grids: whether grids are drawn: there is a decoder.
        evaluation: what the recipe measures, opened; None: nothing, or it is opened when training begins.
        memory_before: peak memory of the process before anything was loaded, in bytes; 0 on a GPU.
        notes: sentences on how the networks were initialized.
        unchecked: trained roles whose first step has not yet been checked to move that role alone, in turn order.
    """

    recipe: Recipe
    config: CheckpointConfig
    method: Method[Any]
    networks: dict[str, nn.Module]
    role_modules: dict[str, RoleModule]
    trainable: dict[str, dict[str, nn.Parameter]]
    optimizers: dict[str, torch.optim.Optimizer]
    scales: dict[str, LossScale]
    averages: list[Ema]
    dataset: Dataset
    engine: Engine
    decoder: Decoder | None = to_uint8
    vae: str | None = None
    has_grids: bool = True
    evaluation: Evaluation | None = None
    images: int = 0
    memory_before: int = 0
    notes: tuple[str, ...] = ()
    unchecked: list[str] = field(init=False)

    def __post_init__(self) -> None:
        roles = [turn.role for turn in sorted(self.method.turns(), key=lambda turn: turn.begins)]
        self.unchecked = list(dict.fromkeys(roles))

    @cached_property
    def _effective_weights(self) -> list[EffectiveWeights]:
        return effective_weights(self.networks) if self.engine.machine.shares_weights else []

    def shared_weights(self) -> AbstractContextManager[object]:
        """A context in which the passes of all networks share weights that are normalized once."""
        return shared_weights(self._effective_weights)

    @property
    def ema(self) -> Ema:
        """The average that grids show and that generator/ holds."""
        return self.averages[0]

    def model(self) -> Denoiser | Generator:
        """Returns that average as `sample` and `evaluate` take it."""
        if self.config.stage != "teacher":
            return Generator(self.ema.network, self.config)
        model = Denoiser(self.ema.network)
        model.encoder = self.config.encoder
        return model

    @property
    def finished(self) -> bool:
        """Returns whether all images of the recipe are seen."""
        return self.images >= self.recipe.training.images

    @property
    def identity(self) -> dict[str, Any]:
        """Returns what, besides the recipe, must not change between a run and its resumption."""
        data, provenance = self.dataset, self.config.provenance
        return {
            "teacher_sha256": provenance.parent,
            **({} if provenance.guide is None else {"guide_sha256": provenance.guide}),
            **({} if provenance.init is None else {"init_sha256": provenance.init}),
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

    def describe(self) -> dict[str, Any]:
        """Returns what will be trained, as plain values."""
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
                for role, network in self.networks.items()
            },
            "device": str(self.engine.device),
            **usage(self.engine),
            "micro_batch": self.engine.machine.micro_batch,
            **self.identity,
        }

    def stream(self) -> Stream:
        """Returns the stream of training data, which can be read from any position."""
        return Stream(
            self.dataset,
            seed=self.recipe.training.seed,
            labels=bool(self.ema.network.label_dim),
            scaling=latent_encoder(self.config.encoder),
            workers=self.engine.workers,
            device=self.engine.device,
        )

    def micro_batches(self) -> list[slice]:
        """Returns the rows of this process's micro-batches."""
        return self.engine.micro_batches(self.recipe.training.batch, self.recipe.group_size)

    def due(self, every: int) -> bool:
        """Returns whether the last round crossed a multiple of `every` images."""
        return self.images // every > (self.images - self.recipe.training.batch) // every

    def unused(self, role: str) -> list[str]:
        """Returns the names of a trained role's parameters that the loss does not reach."""
        if role not in self.trainable:
            return []
        return [name for name, _ in self.networks[role].named_parameters() if name not in self.trainable[role]]

    def set_trainable(self, role: str | None) -> None:
        """Puts the network of `role` in training mode, and freezes all others; None: freezes all."""
        for name, network in self.networks.items():
            if network.training != (name == role):
                network.train(name == role)
                for parameter in self.trainable.get(name, {}).values():
                    parameter.requires_grad_(name == role)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Returns the weights of each role but frozen ones, optimizer states and averages, unsharded.

        All processes call it together. It is empty except on the main one.
        """
        groups = {f"ema-{average.profile.name}": average.network.state_dict() for average in self.averages}
        for role in self._saved_roles():
            groups[role] = {f"weights.{name}": tensor for name, tensor in self.networks[role].state_dict().items()}
        for role, optimizer in self.optimizers.items():
            names = list(self.trainable[role])
            for index, values in plain_states(optimizer).items():
                groups[role] |= {f"{key}.{names[index]}": value for key, value in values.items()}
        return {name: self.engine.gather(tensors) for name, tensors in groups.items()}

    def restore(self, groups: Mapping[str, Mapping[str, Tensor]], images: int) -> None:
        """Loads what `state` returned."""
        self.images = images
        for average in self.averages:
            load_full_state(average.network, groups[f"ema-{average.profile.name}"])
        for role in self._saved_roles():
            trainable = self.trainable.get(role, {})
            index = {name: i for i, name in enumerate(trainable)}
            weights: dict[str, Tensor] = {}
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in groups[role].items():
                kind, _, parameter = name.partition(".")
                if kind == "weights":
                    weights[parameter] = tensor
                else:
                    state.setdefault(index[parameter], {})[kind] = shard_like(tensor, trainable[parameter])
            load_full_state(self.networks[role], weights)
            if role in self.optimizers:
                load_states(self.optimizers[role], state)

    def _saved_roles(self) -> list[str]:
        """Returns the roles that are in a state: all but the frozen ones."""
        return [name for name, role in self.recipe.roles.items() if not role.frozen]
