"""Where, and along what, the tangents of networks are taken in tests."""

import torch
from torch import Tensor

from edmdistill.networks.base import Network
from edmdistill.networks.flow import FlowNetwork

TIMES = torch.tensor([0.3, 0.8, 1.3], dtype=torch.float64)
SPEED = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
CONTINUOUS = ["ddpmpp", "ddpmpp-vp", "ncsnpp-ve", "song-skip", "adm", "edm2"]


def normal(flow: FlowNetwork | Network, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = 3, flow.img_channels, flow.img_resolution, flow.img_resolution
    like = next(flow.parameters())
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)


def classes(flow: FlowNetwork | Network) -> Tensor | None:
    return torch.eye(flow.label_dim)[:3] if flow.label_dim else None
