"""Classifier rejection: more images are drawn than requested, and the best of each class are kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from edmdistill.checkpoints.source import file_digest
from edmdistill.errors import EdmDistillError, counted
from edmdistill.features.classifiers import load_classifier
from edmdistill.networks.flow import FlowNetwork
from edmdistill.sampling.generate import not_finite
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.seeds import MAX_SEED, MAX_SEEDS


@dataclass(frozen=True)
class Rejection:
    """Rejects images by a classifier.

    Attributes:
        ratio: share of the drawn images that is rejected, in [0, 1).
        log_probability: uint8 [B,C,H,W] -> ln p(class given image) [B,label_dim].
        classifier_digest: identifies the classifier in a request for samples.
    """

    ratio: float
    log_probability: Callable[[Tensor], Tensor]
    classifier_digest: str


@dataclass(frozen=True)
class RejectionFiles:
    """A share of images to reject, and the classifier that chooses them; see `load_classifier`."""

    ratio: float
    classifier: str

    def load(self, flow: FlowNetwork, device: torch.device) -> Rejection:
        """Returns the rejection for the classes of a network.

        Raises: EdmDistillError: the network has no classes.  CheckpointError: the classifier cannot be read.
        """
        log_probability = load_classifier(self.classifier, flow.label_dim, device)
        return Rejection(self.ratio, log_probability, file_digest(self.classifier))


class Candidates(NamedTuple):
    """Seeds, and the class that is drawn from each.  int64 [M] both"""

    seeds: Tensor
    classes: Tensor


def candidates(seeds: Sequence[int], classes: Sequence[int] | Tensor, ratio: float) -> Candidates:
    """Returns what is drawn: ceil(n / (1 - ratio)) images of a class of which n are requested.

    Args:
        seeds, classes: of the requested images; further seeds follow the greatest of them.  [N]
        ratio: share of the drawn images that is rejected, in [0, 1).
    Raises: EdmDistillError: a ratio out of range, or seeds beyond the last.
    """
    if not 0 <= ratio < 1:
        raise EdmDistillError(f"the share of images to reject must be in [0, 1), but it is {ratio:g}")
    requested = torch.as_tensor(classes, dtype=torch.int64)
    counts = sorted(Counter(requested.tolist()).items())
    total = sum(math.ceil(round(n / (1 - ratio), 9)) for _, n in counts)
    if total > MAX_SEEDS:
        raise EdmDistillError(
            f"to reject {ratio:g} of the images, {total:,} would have to be drawn, more than the limit of "
            f"{MAX_SEEDS:,}: reject fewer, or draw fewer images"
        )
    more = [number for number, n in counts for _ in range(math.ceil(round(n / (1 - ratio), 9)) - n)]
    first = max(seeds) + 1
    if more and first + len(more) - 1 > MAX_SEED:
        raise EdmDistillError(
            f"rejection needs {counted(len(more), 'seed')} after {first - 1}, but seeds end at {MAX_SEED}: use "
            "lower seeds"
        )
    drawn = torch.tensor([*seeds, *range(first, first + len(more))], dtype=torch.int64)
    return Candidates(drawn, torch.cat([requested, torch.tensor(more, dtype=torch.int64)]))


def sample_best(
    draw: Callable[..., Tensor],
    log_probability: Callable[[Tensor], Tensor],
    seeds: Sequence[int],
    classes: Sequence[int] | Tensor,
    ratio: float,
    *,
    batch: int = 64,
    decode: Callable[[Tensor], Tensor] = to_uint8,
) -> tuple[Tensor, list[int]]:
    """Draws candidates and returns as many images of each class as requested, those most like their class.

    Args:
        draw: (seeds=..., labels=...) -> images [B,C,H,W] in [-1, 1], or NaN, which are kept where there are no others.
        log_probability: of uint8 [B,C,H,W], ln p(class given image).  [B,label_dim]
        seeds, classes, ratio: see candidates.
        decode: from what is drawn to pictures, uint8 [B,C,H,W].
        batch: images that are drawn and classified at a time; only those that may yet be kept stay in memory.
    Returns: images [N,C,H,W], image i of classes[i], within a class in the order of the candidates; and their seeds,
        from which they can be drawn again.
    Raises: EdmDistillError: see candidates; or the classifier returns NaN.
    Source: Kim et al. 2024 (CTM), section 5.1, "Classifier-Rejection Sampling", with n = 50; the official code can keep
        fewer.
    """
    pool, requested = candidates(seeds, classes, ratio), torch.as_tensor(classes, dtype=torch.int64)
    counts = Counter(requested.tolist())
    rows, images, scores = torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.float64)
    for at in range(0, len(pool.seeds), batch):
        new = torch.arange(at, min(at + batch, len(pool.seeds)))
        labels = pool.classes[new]
        drawn = draw(seeds=pool.seeds[new].tolist(), labels=labels)
        broken = not_finite(drawn)
        pictures = decode(drawn.masked_fill(broken[:, None, None, None], 0))
        log_p = log_probability(pictures).cpu().to(torch.float64)[torch.arange(len(new)), labels]
        if bool(log_p.isnan().any()):
            raise EdmDistillError("the classifier returns NaN for a drawn image, so it cannot rank them: use another")
        log_p[broken] = -math.inf
        rows, scores = torch.cat([rows, new]), torch.cat([scores, log_p])
        images = torch.cat([images, drawn]) if len(images) else drawn
        best = torch.cat([_best(pool.classes[rows], scores, number, n) for number, n in counts.items()]).sort().values
        rows, images, scores = rows[best], images[best], scores[best]
    # Sorted by class, the kept images line up with the requested ones.
    place = torch.empty_like(rows)
    place[requested.argsort(stable=True)] = pool.classes[rows].argsort(stable=True)
    return images[place], pool.seeds[rows[place]].tolist()


def _best(classes: Tensor, scores: Tensor, number: int, n: int) -> Tensor:
    """Returns where the n highest scores of a class are, or all if there are fewer; ties go to the first.  [<= n]"""
    members = (classes == number).nonzero().flatten()
    return members[scores[members].argsort(descending=True, stable=True)[:n]]
