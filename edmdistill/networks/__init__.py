"""Networks, by the names that checkpoints have for them."""

from collections.abc import Callable

from edmdistill.networks.adm import DhariwalUNet
from edmdistill.networks.base import Network
from edmdistill.networks.edm2 import UNet
from edmdistill.networks.song import SongUNet

NETWORKS: dict[str, type[Network]] = {"song": SongUNet, "adm": DhariwalUNet, "edm2": UNet}


def new_network(kind: str, img_resolution: int, img_channels: int, label_dim: int, **arguments: object) -> Network:
    """Returns a network with fresh weights for such images; EDM's own classes take the channels twice.

    Raises: TypeError, ValueError: invalid arguments.
    """
    channels = {"img_channels": img_channels}
    if kind != "edm2":
        channels = {"in_channels": img_channels, "out_channels": img_channels}
    make: Callable[..., Network] = NETWORKS[kind]
    return make(img_resolution=img_resolution, label_dim=label_dim, **channels | arguments)
