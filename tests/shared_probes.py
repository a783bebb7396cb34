"""A probe of each kind of run is asked once, which takes most of `prepare`: tests prepare many runs."""

import copy
from typing import Any

import msgspec

from edmdistill.training import prepare
from edmdistill.training.probe import Probe

KNOWN: dict[object, dict[str, set[str]]] = {}


class SharedProbe:
    """Answers by what is known of the same method, options and networks."""

    def __init__(self, method: type, config: msgspec.Struct, networks: dict[str, Any], noise: object) -> None:
        self.all = method, config, networks, noise
        shapes = [
            (role, str(getattr(getattr(network, "network", None), "arguments", None)), name, tensor.shape)
            for role, network in networks.items()
            for name, tensor in network.state_dict().items()
        ]
        self.key = method, msgspec.json.encode(config), tuple(shapes)

    def unused(self) -> dict[str, set[str]]:
        if self.key not in KNOWN:
            KNOWN[self.key] = Probe(*self.all).unused()
        return copy.deepcopy(KNOWN[self.key])


def share_probes() -> None:
    """From here on, in this process."""
    prepare.Probe = SharedProbe
