"""MeanFlow: flow maps, trained on data alone.

Geng et al. 2025 (MeanFlow), as the Eulerian objective of flow maps whose velocity is that of the data and
its noise: in expectation over them, the average velocity over [s, t] obeys MeanFlow's identity.
"""

from __future__ import annotations

from torch import Tensor

from edmdistill.draws import Draws
from edmdistill.methods.augment_pipe import LABELS, Augment, Augmentations, augment_role, augmented, check_augment
from edmdistill.methods.base import Batch, Loss, Role
from edmdistill.methods.flow_map import FlowMap, FlowMapConfig


class MeanFlowConfig(FlowMapConfig, frozen=True, forbid_unknown_fields=True):
    augment: Augment = 0.0
    augmentations: Augmentations = tuple(LABELS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_augment(self)


class MeanFlow(FlowMap[MeanFlowConfig]):
    Config = MeanFlowConfig

    @classmethod
    def roles_for(cls, config: MeanFlowConfig) -> dict[str, Role]:
        roles = super().roles_for(config)
        return roles | {"generator": augment_role(roles["generator"], config)}

    def generator_loss(self, batch: Batch, draws: Draws) -> Loss:
        return super().generator_loss(augmented(batch, draws, self.config), draws)

    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None, v: Tensor, w: Tensor | None) -> Tensor:
        """Returns cos(t) z - sin(t) x0.  It takes the place of MeanFlow's e - x."""
        return v
