"""Rejection by a classifier: more images are drawn than asked for, and the best of each class are kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edmdistill.errors import EdmDistillError
from edmdistill.sampling.grid import to_uint8
from edmdistill.sampling.seeds import MAX_SEED, MAX_SEEDS


class Candidates(NamedTuple):
    """Seeds, and the class that is drawn from each.  int64 [M] both"""

    seeds: Tensor
    classes: Tensor


def candidates(seeds: Sequence[int], classes: Sequence[int] | Tensor, ratio: float) -> Candidates:
    """What is drawn: of a class of which n are asked for, ceil(n / (1 - ratio)).

    Args:
        seeds, classes: what is asked for; further seeds follow the greatest of them.  [N]
        ratio: share of images that is thrown away, in [0, 1).
    Raises: EdmDistillError: a ratio out of range, or seeds beyond the last.
    """
    if not 0 <= ratio < 1:
        raise EdmDistillError(f"the share of images to reject lies in [0, 1), but it is {ratio:g}")
    asked = torch.as_tensor(classes, dtype=torch.int64)
    counts = sorted(Counter(asked.tolist()).items())
    total = sum(math.ceil(round(n / (1 - ratio), 9)) for _, n in counts)
    if total > MAX_SEEDS:
        raise EdmDistillError(
            f"to reject {ratio:g} of the images, {total:,} would be drawn, more than the {MAX_SEEDS:,} of one command: "
            "reject fewer, or draw fewer images"
        )
    more = [number for number, n in counts for _ in range(math.ceil(round(n / (1 - ratio), 9)) - n)]
    first = max(seeds) + 1
    if more and first + len(more) - 1 > MAX_SEED:
        raise EdmDistillError(
            f"rejection takes {len(more)} seeds after {first - 1}, but seeds end at {MAX_SEED}: ask for lower ones"
        )
    drawn = torch.tensor([*seeds, *range(first, first + len(more))], dtype=torch.int64)
    return Candidates(drawn, torch.cat([asked, torch.tensor(more, dtype=torch.int64)]))


def sample_best(
    draw: Callable[..., Tensor],
    log_probability: Callable[[Tensor], Tensor],
    seeds: Sequence[int],
    classes: Sequence[int] | Tensor,
    ratio: float,
    *,
    batch: int = 64,
) -> tuple[Tensor, list[int]]:
    """As many images of each class as are asked for, those that are most like their class.

    Args:
        draw: (seeds=..., labels=...) -> images [B,C,H,W] in [-1, 1].
        log_probability: of uint8 [B,C,H,W], ln p(class given image).  [B,label_dim]
        seeds, classes, ratio: see candidates.
        batch: images that are drawn and judged at a time; besides, only what may yet be kept stays in memory.
    Returns: images [N,C,H,W], image i of classes[i], within a class by rising place among the candidates; and their
        seeds, from which they can be drawn again.
    Raises: EdmDistillError: see candidates; or the classifier gives no number.
    Source: Kim et al. 2024 (CTM), section 5.1, "Classifier-Rejection Sampling", with n = 50.
        Differs: nothing; the official code can keep fewer.
    """
    every, asked = candidates(seeds, classes, ratio), torch.as_tensor(classes, dtype=torch.int64)
    wanted = Counter(asked.tolist())
    rows, images, scores = torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.float64)
    for at in range(0, len(every.seeds), batch):
        new = torch.arange(at, min(at + batch, len(every.seeds)))
        own = every.classes[new]
        drawn = draw(seeds=every.seeds[new].tolist(), labels=own)
        judged = log_probability(to_uint8(drawn)).cpu().to(torch.float64)[torch.arange(len(new)), own]
        if bool(judged.isnan().any()):
            raise EdmDistillError("the classifier gives NaN for a drawn image: it cannot tell which are the best")
        rows, scores = torch.cat([rows, new]), torch.cat([scores, judged])
        images = torch.cat([images, drawn]) if len(images) else drawn
        best = torch.cat([_best(every.classes[rows], scores, number, n) for number, n in wanted.items()]).sort().values
        rows, images, scores = rows[best], images[best], scores[best]
    # The kept ones are in the order of their classes in `asked`, if both are put in the order of classes.
    place = torch.empty_like(rows)
    place[asked.argsort(stable=True)] = every.classes[rows].argsort(stable=True)
    return images[place], every.seeds[rows[place]].tolist()


def _best(classes: Tensor, scores: Tensor, number: int, n: int) -> Tensor:
    """Where the n highest scores of a class are, or all if they are fewer; of equal ones the first.  [<= n]"""
    members = (classes == number).nonzero().flatten()
    return members[scores[members].argsort(descending=True, stable=True)[:n]]
