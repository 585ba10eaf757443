"""From paired differences to a verdict in one of four words, and the sentence that tells it.

The rule. On look k (pairs are added k − 1 times after some were seen) the level is 0.04 for k = 1
and 0.01/2^(k−1) after; these add up to 0.05, so looking again is paid for. Holm's correction shares
the level between the contrasts named beforehand. Each contrast's interval is taken at the level
of the Holm step that decided it; contrasts behind the first that is not rejected take its
level. So an interval excludes zero exactly if its contrast is decided, and each covers with at
least 1 − level of the look; together they are not a simultaneous family.

The verdict is read off the interval:

- `better`, `worse`: it lies above, below zero; the other way round where lower is better. At 0.04
  and less that takes six pairs or more.
- `no_difference`: it lies inside ± margin. Without a margin there is no such verdict.
- `not_enough_seeds`: neither.

A difference that is both sure and smaller than the margin is `better` or `worse`: the sign is
what was asked first, and the sentence adds that it is small.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from normlab.errors import UserError
from normlab.statistics.measure import ACCURACY, Measure
from normlab.statistics.sign_flip import EXACT_PAIRS, sign_flips, smallest_p

MARGIN = 0.005  # half a point of accuracy
FIRST_LEVEL = 0.04
LATER_LEVELS = 0.01  # what all later looks share

Verdict = Literal["better", "worse", "no_difference", "not_enough_seeds"]


@dataclass(frozen=True)
class Contrast:
    """Two arms to compare, named beforehand, and what their pairs gave."""

    first: str
    other: str
    differences: ArrayLike  # (n,) the value of `first` minus that of `other`, pair by pair
    diverged: tuple[int, int] = (0, 0)  # runs of first, of other that diverged
    at_chance: tuple[int, int] = (0, 0)  # that ended, and are not shown to answer better than it


@dataclass(frozen=True)
class Comparison:
    """The verdict on one contrast; `dataclasses.asdict` of it is valid JSON."""

    first: str
    other: str
    n: int  # pairs
    difference: float  # mean of first minus other
    interval: tuple[float, float]  # at `level`; all that is possible, if n is too small
    p_value: float  # after Holm's correction; at most the look's level if decided
    verdict: Verdict
    diverged: tuple[int, int]
    at_chance: tuple[int, int]
    p_unadjusted: float
    level: float  # of the interval: the Holm step's; its confidence is 1 − level
    look: int
    margin: float | None
    sentence: str


def judge(
    contrasts: Sequence[Contrast],
    *,
    look: int,
    generator: np.random.Generator,
    margin: float | None = MARGIN,
    measure: Measure = ACCURACY,
) -> list[Comparison]:
    """Judge all contrasts of a study together on its `look`-th look.

    `margin` is in the unit of the differences; None if nothing counts as no difference.

    Raises `UserError` for a look below 1, a margin that is not positive, or bad differences.
    """
    if margin is not None and not margin > 0:
        raise UserError(f"the margin is {margin}; give a positive fraction, such as {MARGIN}")
    tests = [sign_flips(contrast.differences, generator) for contrast in contrasts]
    p_values = [test.p_value for test in tests]
    adjusted, levels = holm(p_values, level_of_look(look))
    comparisons = []
    for contrast, test, p, p_holm, level in zip(
        contrasts, tests, p_values, adjusted, levels, strict=True
    ):
        lower, upper = test.interval(level)
        comparison = Comparison(
            first=contrast.first,
            other=contrast.other,
            n=test.n,
            difference=test.difference,
            interval=measure.limits(lower, upper),
            p_value=p_holm,
            verdict=_verdict(lower, upper, margin, measure.lower_is_better),
            diverged=contrast.diverged,
            at_chance=contrast.at_chance,
            p_unadjusted=p,
            level=level,
            look=look,
            margin=margin,
            sentence="",
        )
        zero = not np.any(contrast.differences)
        comparisons.append(replace(comparison, sentence=_sentence(comparison, zero, measure)))
    return comparisons


def level_of_look(look: int) -> float:
    """The level of the test on look 1, 2, 3, …: 0.04, 0.005, 0.0025, …; in all less than 0.05.

    Whoever has seen pairs and then asks for more has looked, however few they were: what is asked
    for depends on what was seen.
    """
    if look < 1:
        raise UserError(f"look {look} does not exist; the first report of a study is look 1")
    return FIRST_LEVEL if look == 1 else LATER_LEVELS * 2.0 ** (1 - look)


def holm(p_values: Sequence[float], level: float) -> tuple[list[float], list[float]]:
    """Holm's adjusted p-values, and the level at which each contrast was decided.

    The smallest of m is judged at level/m, the next at level/(m − 1), and so on until one is
    not rejected; all behind it keep its level (Holm, Scandinavian Journal of Statistics 1979).
    """
    adjusted = [1.0] * len(p_values)
    levels = [level] * len(p_values)
    largest, step, rejecting = 0.0, level, True
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        remaining = len(p_values) - rank
        largest = max(largest, min(1.0, remaining * p_values[index]))
        if rejecting:
            step = level / remaining
            rejecting = p_values[index] <= step
        adjusted[index], levels[index] = largest, step
    return adjusted, levels


def _verdict(lower: float, upper: float, margin: float | None, lower_is_better: bool) -> Verdict:
    if lower > 0:
        return "worse" if lower_is_better else "better"
    if upper < 0:
        return "better" if lower_is_better else "worse"
    if margin is not None and -margin <= lower and upper <= margin:
        return "no_difference"
    return "not_enough_seeds"


def _sentence(c: Comparison, zero: bool, measure: Measure) -> str:
    """Claim, figures, what else a reader must know, scope."""
    margin = "" if c.margin is None else _magnitude(c.margin, measure)
    claim = {
        "better": f"{c.first} is better than {c.other}",
        "worse": f"{c.first} is worse than {c.other}",
        "no_difference": f"{c.first} and {c.other} differ by at most {margin}",
        "not_enough_seeds": f"{_pairs(c.n)} cannot tell {c.first} from {c.other}",
    }[c.verdict]
    if zero:
        claim = f"{c.first} and {c.other} scored the same in every pair"
    confidence = f"{100 * (1 - c.level):.5g} %"
    lower, upper = map(measure.difference, c.interval)
    interval = f"{confidence} interval {lower} to {upper}"
    if smallest_p(c.n) > c.level:
        interval = f"no {confidence} interval from so few pairs"
    figures = (
        f"{measure.difference(c.difference)} {measure.unit}, {interval}, "
        f"p = {c.p_value:.2g}, {_pairs(c.n)}, look {c.look}"
    )
    seeds = "this seed" if c.n == 1 else f"these {c.n} seeds"
    scope = f"This holds for {seeds}, {measure.scope}."
    return " ".join([f"{claim}: {figures}.", *_remarks(c, measure), scope])


def _remarks(c: Comparison, measure: Measure) -> list[str]:
    remarks = []
    if smallest_p(c.n) > c.level:
        enough = (n for n in range(c.n, EXACT_PAIRS + 1) if smallest_p(n) <= c.level)
        needed = next(enough, None)
        remarks.append(
            f"Nothing can be shown at this level with fewer than {needed} pairs."
            if needed
            else "Nothing can be shown any more: too many looks were taken."
        )
    small = c.margin is not None and max(map(abs, c.interval)) <= c.margin
    if c.verdict in ("better", "worse") and c.margin is not None and small:
        remarks.append(f"Sure, but small: at most {_magnitude(c.margin, measure)}.")
    for arm, runs in zip((c.first, c.other), c.diverged, strict=True):
        if runs:
            remarks.append(
                f"Diverged and counted {measure.diverged_as}: {runs} of {c.n} runs of {arm}."
            )
    for arm, runs in zip((c.first, c.other), c.at_chance, strict=True):
        if runs:
            remarks.append(
                f"Not shown to answer better than chance: {runs} of {c.n} runs of {arm}."
            )
    return remarks


def _magnitude(difference: float, measure: Measure) -> str:
    return f"{100 * difference:g} points" if measure.fraction else f"{difference:g}"


def _pairs(n: int) -> str:
    return "1 pair" if n == 1 else f"{n} pairs"
