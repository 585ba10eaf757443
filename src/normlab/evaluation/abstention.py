"""Answer only where it is sure enough: how many pictures are answered, how many of them rightly.

Everything here is a function of how sure each answer is (N,) and whether it is right (N,).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.errors import UserError

CONFIDENCE = 0.95  # of the bound
STARTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)  # shares of all pictures answered, where a search begins
LEVEL = (1 - CONFIDENCE) / len(STARTS)


@dataclass(frozen=True)
class RiskCoverage:
    """What is gained by answering only the surest pictures (El-Yaniv & Wiener 2010).

    Attributes:
        threshold: (M,), falling: how sure an answer must be; each one that occurs.
        answered: (M,) pictures at least so sure.
        right: (M,) of them answered rightly.
        total: all pictures, those that are never answered included.
        area: mean error over all numbers answered (AURC, Geifman et al. 2019).
    """

    threshold: NDArray[np.float64]
    answered: NDArray[np.int64]
    right: NDArray[np.int64]
    total: int
    area: float

    @property
    def coverage(self) -> NDArray[np.float64]:
        """Share of pictures answered (M,)."""
        return self.answered / self.total

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of those answered that are right (M,)."""
        return self.right / self.answered


@dataclass(frozen=True)
class Threshold:
    """How sure an answer must be, for those given to be right at a rate.

    Attributes:
        rate: what was asked for.
        least: answers at least so sure are given.
        answered, right, total: of the held-out pictures.
        bound: the rate is at least this with a probability of `CONFIDENCE`: Clopper and Pearson's
            lower bound at `LEVEL`, which allows for the search.
    """

    rate: float
    least: float
    answered: int
    right: int
    total: int
    bound: float

    @property
    def shown(self) -> str:
        """`bound` in percent, rounded down, so that it holds as it is written."""
        return f"{math.floor(1000 * self.bound) / 10:.1f}%"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def risk_coverage(
    sureness: NDArray[np.floating], right: NDArray[np.bool_], total: int | None = None
) -> RiskCoverage:
    """Rank answers by how sure they are; those equally sure are given together.

    Args:
        sureness: (N,); higher is surer.
        right: (N,).
        total: N and the pictures that are never answered; by default N.
    """
    total = len(right) if total is None else total
    if not len(right):
        return RiskCoverage(np.empty(0), np.empty(0, int), np.empty(0, int), total, 0.0)
    order = np.argsort(-sureness, kind="stable")
    ranked = sureness[order].astype(np.float64)
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of those equally sure
    hits = np.cumsum(right[order])[last]
    answered = last + 1
    area = float(np.average(1 - hits / answered, weights=np.diff(answered, prepend=0)))
    return RiskCoverage(ranked[last], answered, hits.astype(np.int64), total, area)


def lower_bound(right: int, total: int, level: float) -> float:
    """Clopper and Pearson's exact one-sided lower bound of a rate (Biometrika 1934).

    The true rate is below it with a probability of at most `level`.
    """
    from scipy.special import betaincinv  # not needed to answer by a rule that was chosen before

    return float(betaincinv(right, total - right + 1, level)) if right else 0.0


def choose_threshold(curve: RiskCoverage, rate: float) -> Threshold | None:
    """The lowest threshold found at which answers are shown to be right at `rate`.

    From each of `STARTS` it walks down, one threshold after the other, for as long as the bound of
    those answered is `rate` or more. A walk stops at its first failure, so its steps need no
    allowance among themselves; the walks share 1 − `CONFIDENCE` (Angelopoulos et al. 2021, arXiv
    2110.01052, fixed sequence testing with several starts). The bound holds for pictures drawn as
    the held-out ones were, and for no others.

    Returns:
        None if it cannot be shown for any.

    Raises:
        UserError: a rate outside (0, 1).
    """
    check_share(rate)
    counts = zip(curve.right.tolist(), curve.answered.tolist(), strict=True)
    bounds = [lower_bound(right, answered, LEVEL) for right, answered in counts]
    shown = np.array(bounds) >= rate
    best = -1
    for start in STARTS:
        i = int(np.searchsorted(curve.answered, start * curve.total))
        failed = np.flatnonzero(~shown[i:])
        reached = i + int(failed[0]) - 1 if len(failed) else len(shown) - 1
        if reached >= i:
            best = max(best, reached)
    if best < 0:
        return None
    return Threshold(
        rate,
        least=float(curve.threshold[best]),
        answered=int(curve.answered[best]),
        right=int(curve.right[best]),
        total=curve.total,
        bound=bounds[best],
    )


def needed(rate: float) -> int:
    """The fewest answered pictures, all rightly, that show a rate: ⌈log(level)/log(rate)⌉."""
    return int(np.ceil(np.log(LEVEL) / np.log(rate)))


def check_share(value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{value:.4g} is no rate: choose more than 0 and less than 1, such as 0.95")
