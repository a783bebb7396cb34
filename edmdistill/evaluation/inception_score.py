"""The Inception score."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, special

from edmdistill.evaluation.base import Accumulator, Measured, Nothing

SPLIT = 5000
"""Images of a split: the standard 50,000 images make the usual ten."""


def inception_scores(logits: Tensor, split: int = SPLIT) -> Tensor:
    """Returns the score of each split: exp( mean_i KL(p(class | image_i) || p(class)) ), p(class) the split's mean.

    Images are split in their order, `split` at a time, as ADM's evaluator does; of 50,000 images that is ten splits, as
    in Salimans et al., StyleGAN and torch-fidelity.

    Args:
        logits: of the classifier.  [N,K]
    Returns: float64 [splits]; the score is their mean, and their spread is what papers give after +-.
    Source: Salimans et al. 2016 (arXiv 1606.03498), section 4.
    Differs: images that are left over at the end belong to the last whole split: ADM's evaluator scores them alone, and
        the score of a few images is low.
    """
    metric = InceptionScore(split=split)
    metric.add(logits)
    return metric.scores()


def inception_score(logits: Tensor, split: int = SPLIT) -> float:
    """Returns the mean of `inception_scores`."""
    return float(inception_scores(logits, split).mean())


class InceptionScore:
    """The mean Inception score of the splits, of each of which it keeps a vector.

    The official score is computed from logits without the bias of the last layer.
    """

    reference: ClassVar[type[Accumulator]] = Nothing
    needs: ClassVar = frozenset({"logits"})

    def __init__(self, reference: None = None, split: int = SPLIT) -> None:
        self._size, self._count = split, 0
        self._sums: list[Tensor] = []
        """The number of images of each split, and the sums of -p ln p and of p over them.  float64 [2 + K]"""

    def update(self, batch: Measured) -> None:
        assert batch.logits is not None
        self.add(batch.logits)

    def add(self, logits: Tensor) -> None:
        """Adds images.  [B,K]"""
        while len(logits):
            taken = self._count % self._size
            some, logits = logits[: self._size - taken], logits[self._size - taken :]
            p = some.cpu().double().softmax(1)
            sums = torch.cat([torch.tensor([len(p), special.entr(p).sum()], dtype=p.dtype), p.sum(0)])
            self._sums.append(sums + self._sums.pop() if taken else sums)
            self._count += len(p)

    def scores(self) -> Tensor:
        """Returns the score of each split.  float64 [splits]"""
        sums = self._sums.copy()
        if len(sums) > 1 and self._count % self._size:
            sums.append(sums.pop() + sums.pop())
        table = torch.stack(sums)
        count, entropy, p = table[:, 0], table[:, 1], table[:, 2:]
        scores: Tensor = (special.entr(p / count[:, None]).sum(1) - entropy / count).exp()
        return scores

    def finish(self) -> float:
        return float(self.scores().mean())
