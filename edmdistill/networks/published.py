"""The published networks by name: kind, image (resolution, channels, classes), and arguments.

Source: the official training scripts of EDM and EDM2.
"""

from __future__ import annotations

from typing import Any

Shape = tuple[int, int, int]

EDM2_CHANNELS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
DDPMPP = {"channel_mult": [2, 2, 2], "augment_dim": 9}
NCSNPP = DDPMPP | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}

PUBLISHED: dict[str, tuple[str, Shape, dict[str, Any]]] = {
    "ddpmpp-cifar10": ("song", (32, 3, 0), DDPMPP),
    "ddpmpp-cifar10-cond": ("song", (32, 3, 10), DDPMPP),
    "ncsnpp-cifar10": ("song", (32, 3, 0), NCSNPP),
    "ncsnpp-cifar10-cond": ("song", (32, 3, 10), NCSNPP),
    "adm-imagenet64": ("adm", (64, 3, 1000), {}),
}
for size, channels in EDM2_CHANNELS.items():
    PUBLISHED[f"edm2-img512-{size}"] = "edm2", (64, 4, 1000), {"model_channels": channels}
    PUBLISHED[f"edm2-img64-{size}"] = "edm2", (64, 3, 1000), {"model_channels": channels}
