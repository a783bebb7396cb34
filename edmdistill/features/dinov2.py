"""DINOv2: the class token of a vision transformer, under two input rules.  Its sizes follow from its weights.

Source: Oquab et al. 2023 (DINOv2); Stein et al. 2023 (Exposing Flaws of Generative Model Evaluation Metrics) for the
Frechet distance in its features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as f
from PIL import Image
from torch import Tensor, nn

from edmdistill.checkpoints.store import fill
from edmdistill.errors import CheckpointError
from edmdistill.features.base import FeatureSpace, exact_float32
from edmdistill.features.weights import FeatureWeights, read_weights

SIZE = 224
"""Height and width of the images that the network takes."""
MAX_DEPTH = 100
"""Most blocks that are made: the largest official network has 40."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of RGB in [0, 1]."""


class Scale(nn.Module):
    """Scales each channel: LayerScale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Self-attention.  [B,N,D] -> [B,N,D]"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [B,N,3,heads,D/heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # Spelled out: torch's own attention picks a kernel by device, of which some round more than float32 does.
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with GELU between them.  [B,N,D] -> [B,N,D]"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(f.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A layer of the transformer, normalized before each part.  [B,N,D] -> [B,N,D]"""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)
        self.ls2 = Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class PatchEmbedding(nn.Module):
    """A vector for each patch of pixels.  [B,3,H,W] -> [B,HW/patch^2,D]"""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """The network.  Its tensors carry the names of facebookresearch/dinov2.

    Args:
        positions: the side of the square of patches for which positions were learned; 37 in the official weights.
    """

    def __init__(self, width: int, depth: int, heads: int, hidden: int, patch: int, positions: int) -> None:
        super().__init__()
        self.positions, self.patches = positions, SIZE // patch
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + positions**2, width))
        self.patch_embed = PatchEmbedding(width, patch)
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the class token after the last norm.  [B,3,224,224] -> [B,D]"""
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.position_embedding()
        for block in self.blocks:
            x = block(x)
        token: Tensor = self.norm(x[:, 0])
        return token

    def position_embedding(self) -> Tensor:
        """Returns the learned positions, resized to the patches of 224 pixels.  [1,1+(224/patch)^2,D]

        The ratio is (patches + 0.1) / positions, as in the official code.
        """
        if self.patches == self.positions:
            return self.pos_embed
        token, square = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        ratio = (self.patches + 0.1) / self.positions
        square = square.reshape(1, self.positions, self.positions, -1).permute(0, 3, 1, 2)
        square = f.interpolate(square, scale_factor=(ratio, ratio), mode="bicubic", align_corners=False)
        return torch.cat((token, square.flatten(2).transpose(1, 2)), 1)


def build(weights: FeatureWeights) -> VisionTransformer:
    """Returns the network whose sizes the weights have, on the CPU.

    Where the file does not state the number of heads, each has 64 channels, as in all official networks, or 16 where
    64 do not divide them.

    Raises: CheckpointError: these are no weights of DINOv2 without registers.
    """
    try:
        if weights.script:
            raise ValueError
        tensors = to_our_names(weights.tensors)
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        positions = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        heads = weights.num_heads or width // (64 if width % 64 == 0 else 16)
        if SIZE % patch or width % heads or depth > MAX_DEPTH:
            raise ValueError
    except (KeyError, ValueError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(
            f"{weights.path} does not hold the weights of a DINOv2 vision transformer: give "
            "dinov2_vitl14_pretrain.pth, which `edmdistill fetch dinov2` downloads"
        ) from error
    with torch.device("meta"):
        network = VisionTransformer(width, depth, heads, hidden, patch, positions)
    fill(network, tensors, str(weights.path))
    return network


TRANSFORMERS = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"encoder\.layer\.": "blocks.",
    r"layernorm\.": "norm.",
    r"(blocks\.\d+)\.attention\.(?:attention\.query|q_proj)\.": r"\1.attn.q.",
    r"(blocks\.\d+)\.attention\.(?:attention\.key|k_proj)\.": r"\1.attn.k.",
    r"(blocks\.\d+)\.attention\.(?:attention\.value|v_proj)\.": r"\1.attn.v.",
    r"(blocks\.\d+)\.attention\.(?:output\.dense|o_proj)\.": r"\1.attn.proj.",
    r"(blocks\.\d+)\.layer_scale([12])\.lambda1": r"\1.ls\2.gamma",
}
"""The beginnings of names in transformers' Dinov2Model, of version 4 and 5, and ours; replaced one after another."""


def to_our_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns DINOv2's tensors by our names, those of facebookresearch/dinov2, whichever of the two they have."""
    renamed = {}
    for name, tensor in tensors.items():
        for theirs, ours in TRANSFORMERS.items():
            name = re.sub(f"^{theirs}", ours, name)
        renamed[name] = tensor
    for query in [name for name in renamed if re.search(r"\.attn\.q\.", name)]:
        parts = [query.replace(".q.", part) for part in (".q.", ".k.", ".v.")]
        if all(part in renamed for part in parts):
            renamed[query.replace(".q.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


class DinoV2(FeatureSpace):
    """EDM2's input rule: bicubic resizing with antialiasing to 224 pixels in floating point, not rounded."""

    name = "dinov2"
    dim: int | None

    def __init__(self, device: torch.device | str = "cpu", weights: Path | None = None) -> None:
        given = read_weights(weights, "dinov2", self.name)
        network = build(given)
        self.sha256, self.official = given.sha256, given.official
        self._device = device
        self._net = network.to(device, torch.float32).eval().requires_grad_(False)
        self._mean = torch.tensor(MEAN, device=device).reshape(1, 3, 1, 1)
        self._std = torch.tensor(STD, device=device).reshape(1, 3, 1, 1)
        self.dim = network.cls_token.shape[2]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, None]:
        x = self.rgb(images)
        with exact_float32():
            return self._net((self.resize(x) / 255 - self._mean) / self._std), None

    def resize(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] -> float32 [B,3,224,224], on the device of the space"""
        x = images.to(self._device, torch.float32)
        return f.interpolate(x, size=(SIZE, SIZE), mode="bicubic", antialias=True)


class DinoV2Dgm(DinoV2):
    """dgm-eval's input rule: PIL's bicubic resizing to 224 pixels, rounded to 8 bits."""

    name = "dinov2-dgm"

    def resize(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        resized = [Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for one in pixels]
        x = torch.from_numpy(np.stack([np.asarray(one) for one in resized])).permute(0, 3, 1, 2)
        return x.to(self._device, torch.float32)
