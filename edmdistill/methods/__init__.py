"""The methods, by the names that the command line and recipes use."""

from __future__ import annotations

from edmdistill.methods.base import Method
from edmdistill.methods.cosim import CoSIM
from edmdistill.methods.ctm import CTM
from edmdistill.methods.diffusion import Diffusion
from edmdistill.methods.discrete_scm import DSCD
from edmdistill.methods.scm import SCD, SCT
from edmdistill.methods.sid import SiD
from edmdistill.methods.vsd import VSD

METHODS: dict[str, type[Method]] = {
    "diffusion": Diffusion,
    "cosim": CoSIM,
    "sid": SiD,
    "scd": SCD,
    "sct": SCT,
    "dscd": DSCD,
    "vsd": VSD,
    "ctm": CTM,
}
