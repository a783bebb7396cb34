"""The networks of a method's roles, made from the networks that a run starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from edmdistill.errors import TrainingError
from edmdistill.machine.compile import compile_blocks
from edmdistill.machine.engine import Engine
from edmdistill.machine.offload import offload
from edmdistill.methods.base import Role
from edmdistill.networks.flow import FlowNetwork
from edmdistill.networks.heads import add_head
from edmdistill.networks.magnitude import EffectiveWeights
from edmdistill.networks.surgery.rebuild import add_guidance, add_logvar
from edmdistill.networks.surgery.two_time import add_second_time, drop_second_time
from edmdistill.recipes.schema import Recipe

PRECISION = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_roles(
    recipe: Recipe, teacher: FlowNetwork, guide: FlowNetwork | None = None, init: FlowNetwork | None = None
) -> dict[str, nn.Module]:
    """Returns the networks of all roles, frozen and in eval mode.

    Args:
        init: initializes the product and the averages that follow it; None: the teacher does.
    Raises: TrainingError: a guide for other data than the teacher's.
    """
    for attribute in ("img_resolution", "img_channels", "sigma_data", "label_dim") if guide is not None else ():
        of_teacher, of_guide = getattr(teacher, attribute), getattr(guide, attribute)
        if of_teacher != of_guide and (attribute, of_guide) != ("label_dim", 0):
            raise TrainingError(
                f"the guide's {attribute} is {of_guide}, but the teacher's is {of_teacher}: choose a guide for the "
                "same data"
            )
    sources = {"teacher": teacher, "guide": guide or teacher}
    product = recipe.method_class.product
    networks = {}
    for name, role in recipe.roles.items():
        is_product = product in (name, role.ema_of.role if role.ema_of is not None else None)
        source = init if init is not None and is_product else sources[role.source]
        learned = source is init and source.two_time
        networks[name] = build_role(role._replace(second_gain=0.0) if learned else role, source, recipe)
    return networks


def build_role(role: Role, flow: FlowNetwork, recipe: Recipe) -> nn.Module:
    """Returns a role's network: a copy of `flow` with the inputs and heads that the role needs, or one made for it."""
    if role.make is not None:
        return role.make(flow, recipe.training.seed).to(flow.dtype).requires_grad_(False).eval()
    if role.augment_dim and role.augment_dim != flow.augment_dim:
        raise TrainingError(
            f"method.augment needs a network with augment_dim = {role.augment_dim}, but this one has "
            f"{flow.augment_dim}: leave method.augment out, or, if the run makes its network, set "
            f"network.arguments.augment_dim = {role.augment_dim}"
        )
    network = add_second_time(flow) if role.two_time else drop_second_time(flow)
    if role.second_gain and network.network.second_time is not None:
        nn.init.constant_(network.network.second_time.gain, role.second_gain)
    if role.logvars:
        network = add_logvar(network, recipe.training.seed, role.logvars)
    if role.guided:
        network = add_guidance(network)
    if role.sigma_min is not None:
        network = raise_sigma_min(network, role.sigma_min, recipe)
    if role.head is not None:
        add_head(network, role.head, recipe.training.seed)
    network.compute_dtype = PRECISION[recipe.training.precision]
    network.requires_grad_(False).eval()
    if role.frozen:
        network.network.fold(sample=False)  # the plan counts no transformed weights
        if network.compute_dtype is not None:
            network.network.store_convolutions(network.compute_dtype)
        return network
    if recipe.training.dropout is not None:
        set_dropout(network, recipe.training.dropout, recipe.training.dropout_max_resolution)
    if any(not other.trained and other.make is None for other in recipe.roles.values()):
        keep_labels(network)
    return network


def keep_labels(network: FlowNetwork) -> None:
    """Turns label dropout off: a network without labels cannot match another that has them."""
    network.label_dropout = network.network.label_dropout = network.network.arguments["label_dropout"] = 0.0


def raise_sigma_min(flow: FlowNetwork, sigma_min: float, recipe: Recipe) -> FlowNetwork:
    """Returns the network for noise levels from sigma_min on.  Raises: TrainingError: its range ends below."""
    if sigma_min >= flow.sigma_max:
        raise TrainingError(
            f"{recipe.method_name} trains from noise level {sigma_min:g} on, but the teacher's end at "
            f"{flow.sigma_max:g}: lower it"
        )
    preconditioning = replace(flow.preconditioning, sigma_min=sigma_min)
    return FlowNetwork(flow.network, preconditioning, label_dropout=flow.label_dropout)


def set_dropout(network: FlowNetwork, dropout: float, max_resolution: int | None) -> None:
    """Sets the dropout of blocks up to max_resolution pixels a side, None: of all. Other blocks get none.

    Source: sCM, appendix G.2.
    """
    for name, block in network.named_modules():
        if hasattr(block, "dropout"):
            resolution = int(name.rpartition(".")[2].partition("x")[0])  # official names: enc.16x16_block0
            block.dropout = dropout if max_resolution is None or resolution <= max_resolution else 0.0


def place_networks(engine: Engine, recipe: Recipe, networks: Mapping[str, nn.Module]) -> None:
    """Moves every network to the device, or offloads it; turns on compilation and activation checkpointing if asked."""
    for name, network in networks.items():
        if isinstance(network, FlowNetwork) and recipe.roles[name].frozen and "teacher" in engine.machine.offload:
            offload(network.network, engine.device)
        else:
            if isinstance(network, FlowNetwork):
                compile_blocks(network.network, engine.machine.compile)
            engine.place(network)
        # After `offload`: a block that is computed again needs its weights again.
        if engine.machine.checkpointing and isinstance(network, FlowNetwork):
            network.network.checkpoint_blocks()


def effective_weights(networks: Mapping[str, nn.Module]) -> list[EffectiveWeights]:
    """Returns what makes the weights of those networks whose layers normalize theirs."""
    flows = [network for network in networks.values() if isinstance(network, FlowNetwork)]
    return [EffectiveWeights(flow.network, flow.compute_dtype) for flow in flows if flow.network.normalizes_weights]


@contextmanager
def shared_weights(all_weights: Iterable[EffectiveWeights]) -> Iterator[None]:
    """A context in which the passes of the networks share weights that are normalized once."""
    with ExitStack() as stack:
        for weights in all_weights:
            stack.enter_context(weights.shared())
        yield
