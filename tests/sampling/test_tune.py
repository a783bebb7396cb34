"""The search for noise levels finds the optimum of a metric in closed form, within its budget, and nothing worse."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edmdistill.errors import EdmDistillError
from edmdistill.sampling.tune import FIRST_SEED, RHOS, SCALES, Choice, Sigmas, Trials, TuningPlan, choose_schedule
from edmdistill.schedules import generator_sigmas

LOW, HIGH = 0.002, 80.0


def edm(nfe: int) -> Sigmas:
    return tuple(generator_sigmas(nfe, LOW, HIGH).tolist())


class Distance:
    """The distance of the logarithms of levels from those of the best, plus a number that depends on the seeds.

    Attributes:
        asked: (levels, first seed) of every measurement.
    """

    def __init__(self, best: Sequence[float], noise: Sequence[float] = (0.0,), sign: Sequence[int] = (1,)) -> None:
        self.best, self.noise, self.sign = best, noise, sign
        self.asked: list[tuple[Sigmas, int]] = []

    def __call__(self, sigmas: Sigmas, seeds: range) -> float:
        self.asked.append((sigmas, seeds.start))
        at = (seeds.start - FIRST_SEED) // len(seeds)
        off = sum(abs(math.log(a / b)) for a, b in zip(sigmas, self.best, strict=True))
        return self.sign[at % len(self.sign)] * off + self.noise[at % len(self.noise)]


def choose(measure: Distance, nfe: int, stored: Sigmas | None = None, **plan: object) -> Choice:
    return choose_schedule(measure, nfe, LOW, HIGH, stored=stored, plan=TuningPlan(n=10, **plan))  # type: ignore[arg-type]


def near(sigmas: Sigmas, best: Sequence[float]) -> bool:
    """Whether levels are those that are best, to the four digits that they are rounded to."""
    return sigmas == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("scales", [(2.0, 8.0), (0.5, 2**0.5), (1.0, 0.125), (2**1.5, 2.0)])
def test_levels_are_found_where_they_are_best(scales: tuple[float, float]) -> None:
    first, *rest = edm(3)
    best = (first, *(level * scale for level, scale in zip(rest, scales, strict=True)))
    measure = Distance(best)
    choice = choose(measure, 3, family="levels")
    assert near(choice.sigmas, best)
    assert choice.before == edm(3)
    assert choice.gain == pytest.approx(sum(abs(math.log(scale)) for scale in scales), abs=2e-3)
    assert len(set(measure.asked)) == len(measure.asked) == choice.schedules + 6


@pytest.mark.parametrize("scale", [0.125, 2**0.5, 4.0])
def test_the_curve_is_scaled_as_a_whole(scale: float) -> None:
    first, *rest = edm(4)
    best = (first, *(level * scale for level in rest))
    choice = choose(Distance(best), 4, family="curve")
    assert near(choice.sigmas, best)
    assert choice.schedules <= TuningPlan(family="curve").most_schedules(4, 1) == 18


@pytest.mark.parametrize("rho", RHOS)
def test_the_curve_is_bent(rho: float) -> None:
    """By a metric that sees the ratio of two levels alone, which no scale changes."""
    wanted = generator_sigmas(3, LOW, HIGH, rho).tolist()

    class Ratio(Distance):
        def __call__(self, sigmas: Sigmas, seeds: range) -> float:
            return round(abs(math.log(sigmas[1] / sigmas[2] / (wanted[1] / wanted[2]))), 2)

    assert near(choose(Ratio(wanted), 3, family="curve").sigmas, wanted)


def test_levels_fall_to_the_lowest_at_most() -> None:
    measured: list[Sigmas] = []
    trials = Trials(lambda sigmas: float(measured.append(sigmas) or 1), LOW)
    schedules = [(80.0, LOW), (80.0, 80.0), (80.0, LOW * 0.99), (80.0, 2.0, 2.0)]
    assert [trials(sigmas) for sigmas in schedules] == [1, math.inf, math.inf, math.inf]
    assert measured == [(80.0, LOW)]


def test_as_many_are_measured_as_the_plan_says() -> None:
    """Two levels fall at every scale, so that none is left out."""
    assert choose(Distance((80.0, 7.0)), 2, family="levels").schedules == len(SCALES)
    assert TuningPlan(n=10, family="levels").most_schedules(2, starts=1) == len(SCALES)


def test_the_spread_is_the_larger_one() -> None:
    for scores, before in ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]):
        assert Choice((80.0,), (80.0,), 1, scores, before).spread == pytest.approx(1)


@given(st.lists(st.floats(-6, 4), min_size=3, max_size=3), st.sampled_from(["levels", "curve", "both"]))
def test_what_is_measured_falls_and_none_is_better(logs: list[float], family: str) -> None:
    measure = Distance((HIGH, *(math.exp(log) for log in logs)))
    choice = choose(measure, 4, family=family)
    tried = {sigmas for sigmas, seed in measure.asked if seed == FIRST_SEED}
    assert all(a > b for sigmas in tried for a, b in pairwise((*sigmas, LOW * 0.999)))
    assert len(tried) == choice.schedules
    assert {sigmas[0] for sigmas in tried} == {edm(4)[0]}
    score = Distance(measure.best)
    assert all(score(choice.sigmas, range(FIRST_SEED, FIRST_SEED + 1)) <= score(s, range(1)) for s in tried)


def test_all_schedules_have_the_same_seeds_and_are_confirmed_on_others() -> None:
    measure = Distance((HIGH, 10.0))
    choice = choose(measure, 2, sets=4)
    searched = [seed for sigmas, seed in measure.asked[: choice.schedules]]
    assert set(searched) == {FIRST_SEED}
    held_out = measure.asked[choice.schedules :]
    firsts = [FIRST_SEED + 10 * at for at in range(1, 5)]
    assert held_out == [(sigmas, seed) for sigmas in (choice.sigmas, edm(2)) for seed in firsts]


def test_the_gain_is_compared_with_the_spread() -> None:
    first, level = edm(2)
    best, noise = (first, 2 * level), (0.0, 0.1, 0.5, 0.9)
    choice = choose(Distance(best, noise), 2)
    assert choice.gain == pytest.approx(math.log(2), abs=1e-3)
    assert choice.spread == pytest.approx(0.4)
    lucky = choose(Distance(best, sign=(1, -1, -1, -1)), 2)
    assert lucky.gain == pytest.approx(-math.log(2), abs=1e-3)


def test_the_levels_in_use_stay_where_none_is_better() -> None:
    stored = (HIGH, 5.0)
    measure = Distance(stored)
    choice = choose(measure, 2, stored)
    assert choice == Choice(stored, stored, len(measure.asked))
    assert (choice.gain, choice.spread) == (0, 0)
    assert {sigmas for sigmas, _ in measure.asked} > {stored, edm(2)}


@pytest.mark.parametrize("budget", [90, 100, 170, 230, 10_000])
def test_the_budget_holds_and_is_used(budget: int) -> None:
    measure = Distance((HIGH, 20.0, 10.0, 5.0))
    choice = choose(measure, 4, images=budget)
    drawn = 10 * len(measure.asked)
    assert drawn <= budget
    assert choice.scores or choice.sigmas == choice.before
    assert choice.schedules == budget // 10 - 6 or budget == 10_000
    assert choice.schedules <= TuningPlan(n=10).most_schedules(4, 1)


def test_a_budget_that_confirms_nothing_is_refused() -> None:
    measure = Distance((HIGH, 20.0))
    with pytest.raises(EdmDistillError, match=r"a budget of 70 images for 2 steps is too small: .* take 80, so raise"):
        choose(measure, 2, images=70)
    assert measure.asked == []
    assert choose(measure, 2, images=80).schedules == 2


def test_the_scales_are_half_steps() -> None:
    assert sorted(map(math.log2, SCALES)) == pytest.approx([half / 2 for half in range(-6, 7)])
