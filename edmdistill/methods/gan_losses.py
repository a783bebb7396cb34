"""Adversarial losses of logits, which are positive for images that look real.  [B,n] -> [B]"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as f
from msgspec import Meta
from torch import Tensor


class GANLoss(NamedTuple):
    """An adversarial loss.

    Attributes:
        discriminator: (real logits, fake logits) -> loss.
        generator: fake logits -> loss; those minus the real ones, if `relative`.
        penalty: default of `gan_penalty`.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    relative: bool = False
    penalty: float = 0.0


HINGE = GANLoss(
    discriminator=lambda real, fake: (1 - real).relu().mean(1) + (1 + fake).relu().mean(1),
    generator=lambda fake: -fake.mean(1),
)
"""Source: Lim & Ye 2017, as in StyleGAN-XL and CTM's code."""

LOG = GANLoss(
    discriminator=lambda real, fake: f.softplus(-real).mean(1) + f.softplus(fake).mean(1),
    generator=lambda fake: -f.softplus(fake).mean(1),
)
"""-log d(x) - log(1 - d(g)) and log(1 - d(g)), d the sigmoid of the logits.  Source: CTM, section 3.3."""

NON_SATURATING = LOG._replace(generator=lambda fake: f.softplus(-fake).mean(1))
"""The same, with -log d(g).  Source: Goodfellow et al. 2014, section 3."""

RELATIVISTIC = GANLoss(
    discriminator=lambda real, fake: f.softplus((fake - real).mean(1)),
    generator=lambda margin: f.softplus(-margin.mean(1)),
    relative=True,
    penalty=1.0,
)
"""-log sigmoid(D(x) - D(g)) and -log sigmoid(D(g) - D(x)) of pairs of images, D the mean logit.

Source: Huang et al. 2024 (R3GAN), with R1 and R2; used by Sabour et al. 2025 (Align Your Flow) to fine-tune.
"""

GAN_LOSSES = {"hinge": HINGE, "log": LOG, "non-saturating": NON_SATURATING, "relativistic": RELATIVISTIC}

GANWeight = Annotated[float, Meta(ge=0, description="weight of the adversarial loss; 0 = none")]


@torch.no_grad()
def gan_signals(real: Tensor, fake: Tensor, relative: bool = False) -> dict[str, Tensor]:
    """Returns the mean logits of real and generated images, and the discriminator's accuracy: .5 is chance.

    An image is judged by the sign of its mean logit, of a relativistic loss by that of its pair's difference.

    Args:
        real, fake: logits.  [B,n] each
        relative: as of GANLoss.
    """
    D_real, D_fake = real.mean(1), fake.mean(1)
    margins = [D_real - D_fake] if relative else [D_real, -D_fake]
    accuracy = torch.stack(margins).sign().add(1).mean() / 2  # a logit of 0 says nothing, and is half right
    return {"logits_real": real.mean(), "logits_fake": fake.mean(), "gan_accuracy": accuracy}
