"""NVIDIA's names of Inception's tensors, in its TorchScript file and its pickle: those of the TensorFlow graph."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

import torch
from torch import Tensor, nn

PATHS = {
    "MixedA": {"branch1x1": "conv", "branch5x5": "tower", "branch3x3dbl": "tower_1", "branch_pool": "tower_2.conv"},
    "MixedB": {"branch3x3": "conv", "branch3x3dbl": "tower"},
    "MixedC": {"branch1x1": "conv", "branch7x7": "tower", "branch7x7dbl": "tower_1", "branch_pool": "tower_2.conv"},
    "MixedD": {"branch3x3": "tower", "branch7x7x3": "tower_1"},
    "MixedE": {
        "branch1x1": "conv",
        "branch3x3_1": "tower_conv",
        "branch3x3_2a": "tower_mixed_conv",
        "branch3x3_2b": "tower_mixed_conv_1",
        "branch3x3dbl_1": "tower_1_conv",
        "branch3x3dbl_2": "tower_1_conv_1",
        "branch3x3dbl_3a": "tower_1_mixed_conv",
        "branch3x3dbl_3b": "tower_1_mixed_conv_1",
        "branch_pool": "tower_2_conv",
    },
}
"""By class of block: our name of a layer, or of a sequence of layers without their numbers, and NVIDIA's."""
LEAVES = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}
"""The tensors of a layer.  NVIDIA's batch normalization does not scale: our bn.weight is 1."""


def to_our_names(tensors: Mapping[str, Tensor], network: nn.Module, in_order: bool = False) -> dict[str, Tensor]:
    """Returns the tensors of Inception by our names, whichever of the two they have.

    Args:
        network: ours.
        in_order: where the names differ, whether tensors of our shapes in our order are taken to be ours. That is a
            guess, to be proved by comparing features.
    """
    left, renamed = dict(tensors), {}
    ours = network.state_dict()
    if in_order and [tensor.shape for tensor in ours.values()] == [tensor.shape for tensor in tensors.values()]:
        return dict(zip(ours, tensors.values(), strict=True))
    if "layers.conv.weight" in left:
        for layer, theirs in nvidia_layers(network).items():
            for leaf, their_leaf in LEAVES.items():
                if f"{theirs}.{their_leaf}" in left:
                    renamed[f"{layer}.{leaf}"] = left.pop(f"{theirs}.{their_leaf}")
            if f"{layer}.bn.bias" in renamed:
                renamed[f"{layer}.bn.weight"] = torch.ones_like(renamed[f"{layer}.bn.bias"])
        left = {f"fc{name.removeprefix('output')}" if name.startswith("output.") else name: left[name] for name in left}
    return renamed | left


def nvidia_layers(network: nn.Module) -> dict[str, str]:
    """Returns NVIDIA's name of each convolution of our network, by our name."""
    names: dict[str, str] = {}
    numbers = {"conv": count(), "mixed": count()}
    for ours, block in network.named_children():
        paths = PATHS.get(type(block).__name__)
        if paths is not None:
            theirs = f"layers.{_numbered('mixed', next(numbers['mixed']))}"
            names |= {f"{ours}.{path}": f"{theirs}.{_path(path, paths)}" for path, _ in block.named_children()}
        elif not isinstance(block, nn.Linear):
            names[ours] = f"layers.{_numbered('conv', next(numbers['conv']))}"
    return names


def _path(ours: str, paths: Mapping[str, str]) -> str:
    """Returns NVIDIA's name of a layer in a block."""
    if ours in paths:
        return paths[ours]
    sequence, _, number = ours.rpartition("_")
    return f"{paths[sequence]}.{_numbered('conv', int(number) - 1)}"


def _numbered(name: str, number: int) -> str:
    """Returns a name as TensorFlow numbers them: conv, conv_1, conv_2 ..."""
    return f"{name}_{number}" if number else name
