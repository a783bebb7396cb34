"""MeanFlow: flow maps, trained on data alone.

Geng et al. 2025 (MeanFlow), as the Eulerian objective of flow maps whose velocity is that of the data and
its noise: in expectation over them, the average velocity over [s, t] obeys MeanFlow's identity.
"""

from __future__ import annotations

from torch import Tensor

from edmdistill.methods.flow_map import FlowMap, FlowMapConfig


class MeanFlowConfig(FlowMapConfig, frozen=True, forbid_unknown_fields=True):
    """Nothing beside the options of flow maps."""


class MeanFlow(FlowMap[MeanFlowConfig]):
    Config = MeanFlowConfig

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None, v: Tensor, w: Tensor | None) -> Tensor:
        """Returns cos(t) z - sin(t) x0.  It takes the place of MeanFlow's e - x."""
        return v
