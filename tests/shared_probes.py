"""A probe of each kind of run is asked once, which takes most of `prepare`: tests prepare many runs."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import msgspec

from edmdistill.training import prepare
from edmdistill.training.probe import Probe

FILE = "EDMDISTILL_TESTS_PROBES"
"""The environment variable that names a file of answers that the process before had."""
KNOWN: dict[tuple[Any, ...], dict[str, set[str]]] = {}


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
    if FILE in os.environ:
        KNOWN.update(pickle.loads(Path(os.environ[FILE]).read_bytes()))


def of_the_package() -> dict[tuple[Any, ...], dict[str, set[str]]]:
    """Returns what is known of methods of the package, which another process can import."""
    return {key: found for key, found in KNOWN.items() if key[0].__module__.startswith("edmdistill.")}
