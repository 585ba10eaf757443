"""Figures that stand beside a verdict and decide nothing."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normlab.errors import UserError
from normlab.statistics.sign_flip import checked_differences, smallest_p

BCA_PAIRS = 20  # below, bootstrap intervals cover too little: about 87 % for 95 % at six pairs
POWER = 0.8


@dataclass(frozen=True)
class Description:
    """Paired differences (n,) described; intervals have the confidence 1 − level."""

    n: int
    mean: float
    sd: float | None  # of the differences, with n − 1; None for one pair
    level: float
    t_interval: tuple[float, float] | None  # None for one pair
    bca_interval: tuple[float, float] | None  # None below 20 pairs or if all are equal
    wilcoxon_p: float  # signed-rank test, two-sided, zeros left out
    smallest_p: float  # that this many pairs could have given in the sign-flip test
    detectable: float | None  # difference shown with 80 % power; None if none could have been


@dataclass(frozen=True)
class McNemar:
    """Compare two sets of weights on the same images. It does not compare two methods."""

    only_first: int  # images that only the first has right
    only_other: int
    p_value: float  # exact, two-sided


def describe(
    differences: ArrayLike, *, level: float, generator: np.random.Generator
) -> Description:
    """Describe paired differences (n,) at the level of the comparison they belong to.

    `detectable` is (t₁₋ₗₑᵥₑₗ⸝₂ + t₀.₈)·sd/√n with n − 1 degrees of freedom: the true difference
    that a t test of so many pairs with this spread shows four times in five, to which the
    sign-flip test comes close. `generator` draws the bootstrap's resamples. Raises `UserError`
    for no differences, one that is not finite, or a level outside (0, 1).
    """
    from scipy import stats  # it takes most of a second, so it waits until it is needed

    # Equal accuracy differences must stay equal for ranks: take off the rounding of a − b.
    d = np.round(checked_differences(differences), 12)
    if not 0 < level < 1:
        raise UserError(f"the level is {level}; give one between 0 and 1, such as 0.05")
    n, mean = len(d), float(d.mean())
    sd = t_interval = detectable = None
    if n > 1:
        sd = float(d.std(ddof=1))
        t = float(stats.t.ppf(1 - level / 2, n - 1))
        half = t * sd / math.sqrt(n)
        t_interval = mean - half, mean + half
        if smallest_p(n) <= level:
            detectable = (t + float(stats.t.ppf(POWER, n - 1))) * sd / math.sqrt(n)
    return Description(
        n=n,
        mean=mean,
        sd=sd,
        level=level,
        t_interval=t_interval,
        bca_interval=_bca_interval(d, level, generator),
        wilcoxon_p=float(stats.wilcoxon(d[d != 0]).pvalue) if d.any() else 1.0,
        smallest_p=smallest_p(n),
        detectable=detectable,
    )


def mcnemar(first_correct: ArrayLike, other_correct: ArrayLike) -> McNemar:
    """McNemar's exact test on two boolean arrays (N,): which images each set of weights has right.

    Raises `UserError` if the arrays are not two lists of the same images.
    """
    from scipy import stats

    first, other = np.asarray(first_correct, bool), np.asarray(other_correct, bool)
    if first.shape != other.shape or first.ndim != 1:
        raise UserError(f"shapes {first.shape} and {other.shape}; give both on the same images")
    only_first, only_other = int((first & ~other).sum()), int((other & ~first).sum())
    discordant = only_first + only_other
    p = stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
    return McNemar(only_first, only_other, float(p))


def accuracy_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of one accuracy, `correct` of `total` test images, as fractions.

    It tells how far another test set of this size may differ; not another seed or training set
    (Wilson, JASA 1927). With p = correct/total, n = total and z the normal quantile, it is

        (p + z²/2n ± z·√(p·(1 − p)/n + z²/4n²)) / (1 + z²/n)

    Raises `UserError` unless 0 ≤ correct ≤ total, total ≥ 1 and 0 < confidence < 1.
    """
    if not (total >= 1 and 0 <= correct <= total):
        raise UserError(f"{correct} correct of {total}; give 0 <= correct <= total, total >= 1")
    if not 0 < confidence < 1:
        raise UserError(f"the confidence is {confidence}; give one between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf((1 + confidence) / 2)  # scipy.stats has it, and takes half a second
    p, share = correct / total, z * z / total
    middle = p + share / 2
    half = z * math.sqrt(p * (1 - p) / total + share / (4 * total))
    low = (middle - half) / (1 + share) if correct else 0.0
    high = (middle + half) / (1 + share) if correct < total else 1.0
    return low, high


def _bca_interval(
    d: NDArray[np.float64], level: float, generator: np.random.Generator
) -> tuple[float, float] | None:
    from scipy import stats

    if len(d) < BCA_PAIRS or np.ptp(d) == 0:
        return None
    low, high = stats.bootstrap(
        (d,), np.mean, confidence_level=1 - level, method="BCa", random_state=generator
    ).confidence_interval
    return float(low), float(high)
