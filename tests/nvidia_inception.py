"""Inception as NVIDIA's files hold it: a module whose layers have the names of the TensorFlow graph."""

import pickle
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as f
from torch import Tensor, nn

from edmdistill.features.inception_names import LEAVES, nvidia_layers
from edmdistill.features.inception_network import InceptionV3 as OurInceptionV3


class Conv2dLayer(nn.Module):
    def __init__(self, channels: int, out: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.empty(out, channels, *kernel))
        self.beta, self.mean, self.var = (nn.Parameter(torch.empty(out)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = f.conv2d(x, self.weight.to(x.dtype), stride=self.stride, padding=self.padding)
        return f.relu(f.batch_norm(x, running_mean=self.mean, running_var=self.var, bias=self.beta, eps=0.001))


def same(channels: int, out: int, height: int = 1, width: int = 1) -> Conv2dLayer:
    return Conv2dLayer(channels, out, (height, width), 1, (height // 2, width // 2))


def valid(channels: int, out: int, stride: int = 2) -> Conv2dLayer:
    return Conv2dLayer(channels, out, (3, 3), stride, (0, 0))


def tower(*layers: nn.Module) -> nn.Sequential:
    named = [("pool" if not isinstance(layer, Conv2dLayer) else "conv", layer) for layer in layers]
    counted, seen = OrderedDict(), 0
    for name, layer in named:
        counted[name if name == "pool" or not seen else f"{name}_{seen}"] = layer
        seen += name == "conv"
    return nn.Sequential(counted)


def means() -> nn.AvgPool2d:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


class InceptionA(nn.Module):
    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.conv = same(channels, 64)
        self.tower = tower(same(channels, 48), same(48, 64, 5, 5))
        self.tower_1 = tower(same(channels, 64), same(64, 96, 3, 3), same(96, 96, 3, 3))
        self.tower_2 = tower(means(), same(channels, pooled))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(x)], dim=1)


class InceptionB(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = valid(channels, 384)
        self.tower = tower(same(channels, 64), same(64, 96, 3, 3), valid(96, 96))
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.pool(x)], dim=1)


class InceptionC(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv = same(channels, 192)
        self.tower = tower(same(channels, inner), same(inner, inner, 1, 7), same(inner, 192, 7, 1))
        middle = [same(inner, inner, 7, 1), same(inner, inner, 1, 7), same(inner, inner, 7, 1)]
        self.tower_1 = tower(same(channels, inner), *middle, same(inner, 192, 1, 7))
        self.tower_2 = tower(means(), same(channels, 192))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(x)], dim=1)


class InceptionD(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tower = tower(same(channels, 192), valid(192, 320))
        self.tower_1 = tower(same(channels, 192), same(192, 192, 1, 7), same(192, 192, 7, 1), valid(192, 192))
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tower(x), self.tower_1(x), self.pool(x)], dim=1)


class InceptionE(nn.Module):
    def __init__(self, channels: int, pool: nn.Module) -> None:
        super().__init__()
        self.conv = same(channels, 320)
        self.tower_conv = same(channels, 384)
        self.tower_mixed_conv = same(384, 384, 1, 3)
        self.tower_mixed_conv_1 = same(384, 384, 3, 1)
        self.tower_1_conv = same(channels, 448)
        self.tower_1_conv_1 = same(448, 384, 3, 3)
        self.tower_1_mixed_conv = same(384, 384, 1, 3)
        self.tower_1_mixed_conv_1 = same(384, 384, 3, 1)
        self.tower_2_pool = pool
        self.tower_2_conv = same(channels, 192)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.tower_conv(x), self.tower_1_conv_1(self.tower_1_conv(x))
        pooled = self.tower_2_conv(self.tower_2_pool(x))
        mixed_a, mixed_a_1 = self.tower_mixed_conv(a), self.tower_mixed_conv_1(a)
        mixed_b, mixed_b_1 = self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b)
        return torch.cat([self.conv(x), mixed_a, mixed_a_1, mixed_b, mixed_b_1, pooled], dim=1)


class InceptionV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[tuple[str, nn.Module]] = [
            ("conv", valid(3, 32)),
            ("conv_1", valid(32, 32, 1)),
            ("conv_2", same(32, 64, 3, 3)),
            ("pool0", nn.MaxPool2d(3, 2)),
            ("conv_3", same(64, 80)),
            ("conv_4", valid(80, 192, 1)),
            ("pool1", nn.MaxPool2d(3, 2)),
            ("mixed", InceptionA(192, 32)),
            ("mixed_1", InceptionA(256, 64)),
            ("mixed_2", InceptionA(288, 64)),
            ("mixed_3", InceptionB(288)),
            ("mixed_4", InceptionC(768, 128)),
            ("mixed_5", InceptionC(768, 160)),
            ("mixed_6", InceptionC(768, 160)),
            ("mixed_7", InceptionC(768, 192)),
            ("mixed_8", InceptionD(768)),
            ("mixed_9", InceptionE(1280, means())),
            ("mixed_10", InceptionE(2048, nn.MaxPool2d(3, 1, 1))),
            ("pool2", nn.AvgPool2d(8)),
        ]
        self.layers = nn.Sequential(OrderedDict(layers))
        self.output = nn.Linear(2048, 1008)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        batch, channels, height, width = img.shape
        assert channels == 3
        x = img.to(torch.float16 if use_fp16 else torch.float32)
        theta = torch.eye(2, 3, device=x.device)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        theta = theta.to(x.dtype).unsqueeze(0).repeat([batch, 1, 1])
        grid = f.affine_grid(theta, [batch, channels, 299, 299], align_corners=False)
        x = f.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        x -= 128
        x /= 128
        features = self.layers(x).reshape(-1, 2048).to(torch.float32)
        if return_features:
            return features
        if no_output_bias:
            return f.softmax(f.linear(features, self.output.weight), dim=1)
        return f.softmax(self.output(features), dim=1)


def nvidia_inception(weights: dict[str, Tensor]) -> InceptionV3:
    """Returns the network with weights that have our names."""
    with torch.device("meta"):
        network, ours = InceptionV3(), OurInceptionV3()
    theirs = {"output.weight": weights["fc.weight"], "output.bias": weights["fc.bias"]}
    for name, their_name in nvidia_layers(ours).items():
        theirs |= {f"{their_name}.{leaf}": weights[f"{name}.{our_leaf}"] for our_leaf, leaf in LEAVES.items()}
    network.load_state_dict(theirs, assign=True)
    return network.eval()


def save_script(network: nn.Module, path: Path) -> Path:
    """Writes the network as TorchScript; returns its path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network), path)
    return path


def save_pickle(network: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes the network as torch_utils.persistence does: for each object, its class's name and a dict."""

    def _reconstruct_persistent_obj() -> None: ...

    def reduce(self: nn.Module) -> tuple[object, ...]:
        meta = {"type": "class", "version": 6, "module_src": "# removed", "class_name": type(self).__name__}
        return _reconstruct_persistent_obj, (meta | {"state": self.__dict__},), None

    module = ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    for kind in (Conv2dLayer, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE, InceptionV3):
        monkeypatch.setattr(kind, "__reduce__", reduce)
    path.write_bytes(pickle.dumps(network, protocol=4))
    return path
