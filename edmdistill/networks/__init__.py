"""Networks, by the names that checkpoints have for them."""

from collections.abc import Callable

from edmdistill.networks.adm import DhariwalUNet
from edmdistill.networks.base import Network
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.song import SongUNet

NETWORKS: dict[str, type[Network]] = {"song": SongUNet, "adm": DhariwalUNet, "edm2": UNet}


def image_arguments(kind: str, img_resolution: int, img_channels: int, label_dim: int) -> dict[str, int]:
    """Returns the arguments of a network that its images determine; EDM's own classes take the channels twice."""
    names = ("img_channels",) if kind == "edm2" else ("in_channels", "out_channels")
    return {"img_resolution": img_resolution, "label_dim": label_dim} | dict.fromkeys(names, img_channels)


def new_network(kind: str, img_resolution: int, img_channels: int, label_dim: int, **arguments: object) -> Network:
    """Returns a network with fresh weights for such images.  Raises: TypeError, ValueError: invalid arguments."""
    make: Callable[..., Network] = NETWORKS[kind]
    return make(**image_arguments(kind, img_resolution, img_channels, label_dim) | arguments)
