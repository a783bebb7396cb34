"""Reads the networks of CTM: ADM for ImageNet 64x64, DDPM++ for CIFAR-10, each with a second time.

The time has two embeddings, by layers of their own, and every block has a linear map for each. A file holds weights
only: which network it is, and its architecture, is inferred from their names and shapes.

Facts: sony/ctm (cm/unet.py), Kim-Dongjun/ctm-cifar10 (cm/networks.py, cm/fp16_util.py, cm/train_util.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edmdistill.checkpoints.official import edm_arguments
from edmdistill.checkpoints.openai import PRECONDITIONING, TOP, UnknownNetwork, to_adm


class CtmNetwork(NamedTuple):
    """The network in a file of CTM's, and what else its checkpoint says.

    Attributes:
        kind, arguments, tensors: our network and its weights.
        preconditioning: as a checkpoint states it.
        data_set: what it was trained on, a key of class_names.DATA_SETS.
        licence: of the network that it was distilled from.
    """

    kind: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    preconditioning: Mapping[str, Any]
    data_set: str
    licence: str


def to_ctm(weights: Mapping[str, Tensor]) -> CtmNetwork:
    """Returns the network that the weights of a file belong to.

    Raises: UnknownNetwork: there is no second time.  KeyError, ValueError ...: they belong to another network.
    """
    split = {"two_time": True, "split_times": True}
    if any(name.startswith("time_embed_s.") for name in weights):
        merged, second = merge_times(weights, TOP)
        arguments, tensors = to_adm(merged)
        return CtmNetwork("adm", arguments | split, tensors | second, PRECONDITIONING, "imagenet", "mit")
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if not any(name.startswith("map_layer0_s.") for name in weights):
        raise UnknownNetwork("reads no second time")
    tensors, second = merge_times(weights, {name: name for name in ("map_layer0", "map_layer1")})
    arguments = edm_arguments(tensors, "song")
    return CtmNetwork(
        "song", arguments | split, tensors | second, {"kind": "edm"}, "cifar10", licence="cc-by-nc-sa-4.0"
    )


def merge_times(weights: Mapping[str, Tensor], embedding: Mapping[str, str]) -> tuple[dict[str, Tensor], ...]:
    """Returns the weights with one map of both embeddings side by side for each pair of maps; and our second time's.

    Args:
        weights: a layer of the second time has the name of the first time's layer and _s.
        embedding: our names of the layers that embed a time, by CTM's.
    Raises: KeyError, RuntimeError: a map has no partner, or one of another shape.
    """
    merged = {name: tensor.float() for name, tensor in weights.items() if "_s." not in name}
    second = {"second_time.gain": torch.ones([])}
    for name in weights.keys() - merged.keys():
        first, tensor = name.replace("_s.", "."), weights[name].float()
        layer, _, leaf = first.rpartition(".")
        if layer in embedding:
            second[f"second_time.{embedding[layer]}.{leaf}"] = tensor
        else:
            merged[first] = torch.cat([merged[first], tensor], dim=1) if leaf == "weight" else merged[first] + tensor
    return merged, second
