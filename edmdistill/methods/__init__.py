"""The methods, by the names that the command line and recipes use."""

from __future__ import annotations

from .base import Method
from .cosim import CoSIM
from .diffusion import Diffusion
from .sid import SiD

METHODS: dict[str, type[Method]] = {"diffusion": Diffusion, "cosim": CoSIM, "sid": SiD}
