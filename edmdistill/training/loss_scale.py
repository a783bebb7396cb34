"""The loss scale of fp16."""

from __future__ import annotations

import math

from edmdistill.checkpoints.run_state import Scale


class LossScale:
    """The factor by which a loss is multiplied so that its gradients do not underflow in fp16.

    It is halved when a gradient is not finite, whose step is skipped, and doubled after `patience` finite ones.
    Source: Micikevicius et al. 2018, section 3.2; the numbers are torch.amp.GradScaler's.
    """

    def __init__(self, scale: float = 2.0**16, patience: int = 2000) -> None:
        self.scale = scale
        self.patience = patience
        self.good = 0

    @property
    def can_shrink(self) -> bool:
        """Returns whether a smaller scale may help; at 1, the scale is not the cause."""
        return self.scale > 1

    def update(self, finite: bool) -> None:
        """Adjusts the scale after a step whose gradient was finite, or was not."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good == self.patience:
            self.scale, self.good = self.scale * 2, 0
        assert math.isfinite(self.scale)

    def state(self) -> Scale:
        """Returns what `restore` takes."""
        return Scale(self.scale, self.good)

    def restore(self, state: Scale) -> None:
        self.scale, self.good = state.scale, state.good
