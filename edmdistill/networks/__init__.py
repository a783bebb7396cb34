"""Networks, under the names that checkpoints know them by."""

from .base import Network
from .edm2 import UNet

NETWORKS: dict[str, type[Network]] = {"edm2": UNet}
