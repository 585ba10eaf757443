"""The sign-flip permutation test on paired differences, and the interval that inverts it.

If two arms are alike, each difference dᵢ is as likely to have been −dᵢ. So compare |Σ dᵢ| with
|Σ sᵢ dᵢ| over all signs s: p is the share of flips that reach it, the data's own signs included
(Fisher, The Design of Experiments, 1935, §21).

The interval is the set of shifts δ for which the test does not reject dᵢ − δ. Let A be the pairs
whose signs are flipped, Aᶜ the others. For δ below the mean difference, Σ (dᵢ − δ) > 0 and

    |Σ sᵢ (dᵢ − δ)| ≥ Σ (dᵢ − δ)   ⇔   Σ_A (dᵢ − δ) ≤ 0  or  Σ_Aᶜ (dᵢ − δ) ≤ 0
                                   ⇔   min(mean_A d, mean_Aᶜ d) ≤ δ

So p(δ) is the share of splits {A, Aᶜ} whose smaller mean is at most δ, and the lower limit is an
order statistic of these smaller means; the upper limit mirrors it. Nothing is searched for, and
test and interval cannot disagree (Hartigan, Using subsample values as typical values, JASA 1969).
Flipping A or Aᶜ gives the same statistic, so the 2ⁿ⁻¹ splits stand for all 2ⁿ flips.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normlab.errors import UserError

EXACT_PAIRS = 20  # up to here every flip is counted: 2¹⁹ splits, 4 MB an array
RANDOM_FLIPS = 100_000  # beyond, so many random flips beside the data's own signs
BLOCK = 12  # pairs whose subset sums are tabulated together when flips are random
TIE = 1e-10  # a subset mean this small beside the largest difference is zero but for rounding


@dataclass(frozen=True, eq=False)
class SignFlips:
    """The flips of n paired differences; the M splits include A = ∅, the data's own signs."""

    n: int
    difference: float  # mean of the n differences
    low: NDArray[np.float64]  # (M,) the smaller of mean_A and mean_Aᶜ; −∞ where A or Aᶜ is empty
    high: NDArray[np.float64]  # (M,) the larger of the two; +∞ where A or Aᶜ is empty

    @property
    def p_value(self) -> float:
        """Two-sided p of "no difference"; exact up to `EXACT_PAIRS`, valid with random flips."""
        # The side that the mean is on decides; on the other side every split counts.
        return float(min(np.mean(self.low <= 0), np.mean(self.high >= 0)))

    def interval(self, level: float) -> tuple[float, float]:
        """All shifts that the test does not reject at `level`; (−∞, ∞) where it never rejects.

        It excludes 0 exactly if `p_value <= level`. Coverage is at least 1 − level if the
        differences are symmetric about the true one.
        """
        if not 0 < level < 1:
            raise UserError(f"the level is {level}; give one between 0 and 1, such as 0.05")
        last = len(self.low) - 1
        rejecting = int(level * len(self.low))  # this many splits may reach the statistic
        return (
            float(np.partition(self.low, rejecting)[rejecting]),
            float(np.partition(self.high, last - rejecting)[last - rejecting]),
        )


def sign_flips(differences: ArrayLike, generator: np.random.Generator) -> SignFlips:
    """Flip the signs of paired differences (n,) in every way, or at random beyond 20 pairs.

    `generator` is drawn from only beyond `EXACT_PAIRS`. Raises `UserError` for no differences
    or one that is not finite.
    """
    d = checked_differences(differences)
    sums, sizes = _all_splits(d) if len(d) <= EXACT_PAIRS else _random_splits(d, generator)
    low = np.full(len(sums), -np.inf)
    high = np.full(len(sums), np.inf)
    split = (sizes > 0) & (sizes < len(d))
    inside = sums[split] / sizes[split]
    outside = (d.sum() - sums[split]) / (len(d) - sizes[split])
    # Accuracies are counts over N, so subsets often cancel; rounding must not break such ties.
    tie = TIE * np.abs(d).max()
    inside[np.abs(inside) <= tie] = 0.0
    outside[np.abs(outside) <= tie] = 0.0
    low[split] = np.minimum(inside, outside)
    high[split] = np.maximum(inside, outside)
    return SignFlips(len(d), float(d.mean()), low, high)


def smallest_p(n: int) -> float:
    """The smallest p that n pairs can give: 2/2ⁿ up to 20 pairs, 1/100,001 beyond."""
    if n < 1:
        raise UserError(f"{n} pairs have no p-value; give at least one")
    return 2.0 ** (1 - n) if n <= EXACT_PAIRS else 1 / (RANDOM_FLIPS + 1)


def checked_differences(differences: ArrayLike) -> NDArray[np.float64]:
    """Return differences as an array (n,) of finite numbers, n ≥ 1; else raise `UserError`."""
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or d.size == 0:
        raise UserError(f"differences have the shape {d.shape}; give a list with one per pair")
    if not np.isfinite(d).all():
        pair = int(np.flatnonzero(~np.isfinite(d))[0])
        raise UserError(f"difference {pair} is {d[pair]}; score a diverged run at chance instead")
    return d


def _all_splits(d: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and size of every A without the last pair, A = ∅ first: each split {A, Aᶜ} once."""
    return _subset_sums(d[:-1]), _subset_sums(np.ones(len(d) - 1))


def _random_splits(
    d: NDArray[np.float64], generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and size of A = ∅ and of `RANDOM_FLIPS` random A, each pair in A with probability ½."""
    sums = np.zeros(RANDOM_FLIPS + 1)
    sizes = np.zeros(RANDOM_FLIPS + 1)
    for start in range(0, len(d), BLOCK):
        block = d[start : start + BLOCK]
        subset = generator.integers(2 ** len(block), size=RANDOM_FLIPS + 1)
        subset[0] = 0
        sums += _subset_sums(block)[subset]
        sizes += _subset_sums(np.ones(len(block)))[subset]
    return sums, sizes


def _subset_sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of all 2ⁿ subsets of n values; bit i of the index says whether value i is in."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums
