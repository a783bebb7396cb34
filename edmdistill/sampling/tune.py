"""Tuned schedules: the noise levels of a generator's steps, chosen by a metric and confirmed on held-out seeds.

All schedules are measured on the same seeds, so that their differences are not those of the noise. The best of many
noisy measurements looks better than it is: the chosen schedule and the one in use until then are therefore measured
again, on several sets of other seeds, and the choice counts only if it is better there by more than their spread.

Source: CoSIM, section 3.3: EDM's curve, whose levels are then scaled greedily.
Differs: the paper gives neither the scales nor the number of images. EDM's curve is scaled as a whole, and bent by rho,
    before its levels are scaled one by one; `levels` alone is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from edmdistill.errors import EdmDistillError
from edmdistill.schedules import generator_sigmas

Sigmas = tuple[float, ...]
Family = Literal["levels", "curve", "both"]
SCALES = (1.0, *(2 ** (half / 2) for half in range(-6, 7) if half))
"""By which levels are scaled: 1/8 to 8 in steps of sqrt(2); 1 comes first, so that ties change nothing."""
RHOS = (7.0, 2.0, 3.0, 5.0, 10.0, 15.0)
"""Values of rho for EDM's curve; its own comes first."""
FIRST_SEED = 10_000_000
"""First seed of the search. No protocol measures these seeds: eval's numbers are of images that chose nothing."""


class BudgetSpent(Exception):
    """As many schedules were measured as may be."""


class Trials:
    """Scores schedules, each once; lower is better. One that does not fall to sigma_min or above scores infinity.

    Args:
        measure: gives the score of a schedule.
        sigma_min: the lowest level.
        most: schedules that may be measured; None: any number.
    Attributes:
        scores: of what was measured, in that order.
    """

    def __init__(self, measure: Callable[[Sigmas], float], sigma_min: float, most: int | None = None) -> None:
        self._measure, self._sigma_min, self._most = measure, sigma_min, most
        self.scores: dict[Sigmas, float] = {}

    def __call__(self, sigmas: Sigmas) -> float:
        """Returns the score of a schedule.  Raises: BudgetSpent."""
        if sigmas[-1] < self._sigma_min or any(a <= b for a, b in pairwise(sigmas)):
            return math.inf
        if sigmas not in self.scores:
            if len(self.scores) == self._most:
                raise BudgetSpent
            self.scores[sigmas] = self._measure(sigmas)
        return self.scores[sigmas]

    @property
    def best(self) -> Sigmas:
        """The schedule with the lowest score, of equal ones the first."""
        return min(self.scores, key=self.scores.__getitem__)


def search_levels(score: Callable[[Sigmas], float], start: Sigmas) -> Sigmas:
    """Returns a schedule whose levels, but the first, were scaled greedily, from the highest to the lowest.

    Source: CoSIM, section 3.3.
    """
    best = start
    for i in range(1, len(start)):
        scaled = [(*best[:i], _scaled(best[i], scale), *best[i + 1 :]) for scale in SCALES]
        best = min(scaled, key=score)
    return best


def search_curve(score: Callable[[Sigmas], float], edm: Sigmas, sigma_min: float) -> Sigmas:
    """Returns EDM's curve `edm` with all levels but the first scaled together, and then with another rho."""

    def curve(rho: float, scale: float) -> Sigmas:
        _, *rest = edm if rho == RHOS[0] else generator_sigmas(len(edm), sigma_min, edm[0], rho).tolist()
        return edm[0], *(_scaled(level, scale) for level in rest)

    scale = min(SCALES, key=lambda scale: score(curve(RHOS[0], scale)))
    return curve(min(RHOS, key=lambda rho: score(curve(rho, scale))), scale)


def _scaled(level: float, scale: float) -> float:
    """Returns a level times a scale, to four digits; unless it is 1, for which the level stays as it is."""
    return level if scale == 1 else float(f"{level * scale:.4g}")


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """How schedules are searched for, and confirmed.

    Attributes:
        family: levels: each level is scaled; curve: EDM's curve is, as a whole, and gets another rho; both: the curve,
            then its levels.
        n: images of a measurement.
        sets: of n held-out seeds, two or more.
        images: to be drawn at most, confirmation included; None: any number.
    """

    family: Family = "both"
    n: int = 5000
    sets: int = 3
    images: int | None = None

    @property
    def seeds(self) -> list[range]:
        """Those of the search, then the sets of held-out ones."""
        firsts = range(FIRST_SEED, FIRST_SEED + (1 + self.sets) * self.n, self.n)
        return [range(first, first + self.n) for first in firsts]

    def most_schedules(self, nfe: int, starts: int) -> int:
        """Returns how many schedules are measured at most in the search.

        Args:
            starts: the number of schedules that it begins with.
        Raises: EdmDistillError: there are too few images to confirm what is found.
        """
        curve = 0 if self.family == "levels" else len(SCALES) + len(RHOS) - 2  # EDM's own is among the starts
        levels = 0 if self.family == "curve" else (len(SCALES) - 1) * (nfe - 1)
        if self.images is None:
            return starts + curve + levels
        most = self.images // self.n - 2 * self.sets
        if most <= starts:
            least = (starts + 1 + 2 * self.sets) * self.n
            raise EdmDistillError(
                f"a budget of {self.images:,} images for {nfe} steps is too small: one schedule to try and "
                f"{2 * self.sets} measurements on held-out seeds take {least:,}, so raise --budget or lower --n"
            )
        return min(starts + curve + levels, most)


class Choice(NamedTuple):
    """The best schedule of a search, and the one in use until then.

    Attributes:
        schedules: the number that were measured.
        scores, before_scores: of either on each set of held-out seeds; empty if they are the same schedule.
    """

    sigmas: Sigmas
    before: Sigmas
    schedules: int
    scores: Sequence[float] = ()
    before_scores: Sequence[float] = ()

    @property
    def gain(self) -> float:
        """By how much the mean score is lower on held-out seeds."""
        return fmean(self.before_scores) - fmean(self.scores) if self.scores else 0.0

    @property
    def spread(self) -> float:
        """The larger standard deviation of the two."""
        return max(stdev(self.scores), stdev(self.before_scores)) if self.scores else 0.0


def choose_schedule(
    measure: Callable[[Sigmas, range], float],
    nfe: int,
    sigma_min: float,
    sigma_max: float,
    *,
    stored: Sigmas | None = None,
    plan: TuningPlan,
) -> Choice:
    """Searches for the best schedule, and measures it again on held-out seeds.

    Args:
        measure: gives the score of a schedule on seeds; lower is better.
        nfe: steps, two or more.
        stored: the schedule in use; None: EDM's curve.
    Raises: EdmDistillError: the plan's images are too few.
    """
    edm: Sigmas = tuple(generator_sigmas(nfe, sigma_min, sigma_max).tolist())
    starts = list(dict.fromkeys((stored or edm, edm)))
    searched, *held_out = plan.seeds
    trials = Trials(lambda sigmas: measure(sigmas, searched), sigma_min, plan.most_schedules(nfe, len(starts)))
    with suppress(BudgetSpent):
        for start in starts:
            trials(start)
        if plan.family != "levels":
            search_curve(trials, edm, sigma_min)
        if plan.family != "curve":
            search_levels(trials, trials.best)
    choice = Choice(trials.best, starts[0], len(trials.scores))
    if choice.sigmas == choice.before:
        return choice
    scores, before = ([measure(sigmas, seeds) for seeds in held_out] for sigmas in choice[:2])
    return choice._replace(scores=scores, before_scores=before)
