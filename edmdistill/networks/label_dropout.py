"""Classifier-free guidance needs a network that was trained without classes part of the time; most were not."""

from __future__ import annotations


def guidance_problem(label_dim: int, label_dropout: float, advice: str) -> str | None:
    """Returns why a network cannot guide itself by leaving its classes out; None where it can.

    Args:
        label_dim: number of its classes.
        label_dropout: share of its training in which it was given none, in [0, 1].
        advice: what to do instead, the end of the sentence.
    """
    if not label_dim:
        return f"guidance leaves the classes out, and this network has none: {advice}"
    if not label_dropout:
        return f"guidance leaves the classes out, and this network was never trained without them: {advice}"
    return None
