"""Guidance: extrapolates a denoiser away from a second one."""

from __future__ import annotations

from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.networks.flow import Denoiser
from edmdistill.networks.label_dropout import guidance_problem


def require_guidance(main: Denoiser, guide: Denoiser | None, force: bool) -> None:
    """Checks that a network can be guided: by another one, or by itself without classes if it was trained so.

    Args:
        force: let a network guide itself that was never trained without classes.
    Raises: EdmDistillError: the network has no classes, or `force` is needed.
    """
    if guide is not None:
        return
    advice = "name a guide, a weaker network of the same data, by --guide, or leave guidance at 1"
    if main.label_dim:
        advice = advice.replace(", or leave guidance at 1", ", leave guidance at 1, or say --force-guidance")
    refusal = guidance_problem(main.label_dim, 1.0 if force else main.label_dropout, advice)
    if refusal is not None:
        raise EdmDistillError(refusal)


class GuidedDenoiser:
    """D(x) = D_guide(x) + weight (D_main(x) - D_guide(x)): weight 1 is no guidance, as in EDM2.

    Without a guide this is classifier-free guidance: the main network without its labels. A guide that is a weaker
    network of the same classes is autoguidance; one without classes stands for the unconditional network.

    Raises: EdmDistillError: see `require_guidance`; or a guide of other images, classes, dtype or device.
    Source: Ho & Salimans 2022; Karras et al. 2024 (autoguidance), eq. 3.
    """

    def __init__(self, main: Denoiser, weight: float, guide: Denoiser | None = None, *, force: bool = False) -> None:
        require_guidance(main, guide, force)
        self.main, self.guide, self.weight = main, guide or main, weight
        for what in ("img_channels", "img_resolution", "label_dim"):
            ours, theirs = getattr(main, what), getattr(self.guide, what)
            if ours != theirs and (what, theirs) != ("label_dim", 0):
                raise EdmDistillError(
                    f"the guide's {what} is {theirs}, but the main network's is {ours}: choose a guide for the same "
                    "data"
                )
        alike = [(next(each.flow.parameters()).device, each.flow.dtype) for each in (main, self.guide)]
        if alike[0] != alike[1]:
            (device, dtype), (its_device, its_dtype) = alike
            raise EdmDistillError(
                f"the guide computes in {its_dtype} on {its_device}, but the main network in {dtype} on {device}: load "
                "both with the same dtype and device"
            )
        self.drops_labels = guide is None or not guide.label_dim
        self.sigma_min, self.sigma_max, self.round_sigma = main.sigma_min, main.sigma_max, main.round_sigma

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        reference = self.guide(x, sigma, None if self.drops_labels else labels)
        guided: Tensor = reference.lerp(self.main(x, sigma, labels), self.weight)
        return guided
