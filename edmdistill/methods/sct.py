"""sCT: continuous-time consistency models, trained on data alone.

Lu & Song 2025 (ICLR), algorithm 1 without a teacher: the trajectory's velocity is that of the data and its noise.
"""

from __future__ import annotations

from torch import Tensor

from edmdistill.methods.base import Role
from edmdistill.methods.scm import SCM, SCMConfig


class SCTConfig(SCMConfig, frozen=True, forbid_unknown_fields=True):
    """Nothing beside sCM's own options."""


class SCT(SCM[SCTConfig]):
    Config = SCTConfig
    roles = {"generator": Role(trained=True, logvars=1)}

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None, v: Tensor, w: Tensor | None) -> Tensor:
        """Returns cos(t) z - sin(t) x0."""
        return v
