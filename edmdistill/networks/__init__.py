"""Networks, under the names that checkpoints know them by."""

from .adm import DhariwalUNet
from .base import Network
from .edm2 import UNet
from .song import SongUNet

NETWORKS: dict[str, type[Network]] = {"song": SongUNet, "adm": DhariwalUNet, "edm2": UNet}
