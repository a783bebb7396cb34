"""Classifier-free guidance needs a network trained with label dropout; most were trained without."""

from __future__ import annotations


def guidance_problem(label_dim: int, label_dropout: float, advice: str) -> str | None:
    """Returns why a network cannot be used for classifier-free guidance; None if it can.

    Args:
        label_dim: number of its classes.
        label_dropout: fraction of training in which it was given no class, in [0, 1].
        advice: what to do instead, which ends the sentence.
    """
    if not label_dim:
        return f"guidance leaves the classes out, and this network has none: {advice}"
    if not label_dropout:
        return f"guidance leaves the classes out, and this network was never trained without them: {advice}"
    return None
