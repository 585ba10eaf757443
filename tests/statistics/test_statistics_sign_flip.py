"""The sign-flip test and its interval against enumeration, SciPy and closed forms."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from normlab.errors import UserError
from normlab.statistics import SignFlips, sign_flips, smallest_p

# Accuracy differences on 10,000 images, as whole images: small numbers, so ties are common.
COUNTS = st.lists(st.integers(-30, 30), min_size=1, max_size=10)
LEVELS = st.sampled_from([0.005, 0.02, 0.04, 0.0625, 0.1, 0.25, 0.5])


def flipped(counts: list[int]) -> SignFlips:
    # a − b leaves rounding errors, as differences of real accuracies do
    differences = np.array([(7900 + count) / 10_000 - 0.79 for count in counts])
    return sign_flips(differences, np.random.default_rng(0))


def enumerated_p(values: Sequence[int | Fraction]) -> float:
    """The definition, in exact arithmetic: the share of all 2ⁿ flips that reach |Σ d|."""
    observed = abs(sum(values))
    signs = itertools.product((1, -1), repeat=len(values))
    reached = [
        abs(sum(s * v for s, v in zip(flip, values, strict=True))) >= observed for flip in signs
    ]
    return sum(reached) / len(reached)


@settings(deadline=None, max_examples=60)
@given(COUNTS)
def test_p_value_is_the_enumerated_share(counts: list[int]) -> None:
    assert flipped(counts).p_value == enumerated_p(counts)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=6), LEVELS)
def test_interval_is_the_set_of_shifts_not_rejected(counts: list[int], level: float) -> None:
    means = {
        Fraction(sum(subset), size)
        for size in range(1, len(counts) + 1)
        for subset in itertools.combinations(counts, size)
    }
    # p changes only at subset means, so these, the gaps between and both ends are all shifts.
    points = [min(means) - 1, *sorted(means), max(means) + 1]
    gaps = [(a + b) / 2 for a, b in itertools.pairwise(points)]
    kept = [shift for shift in points + gaps if enumerated_p([c - shift for c in counts]) > level]
    lower, upper = flipped(counts).interval(level)
    if points[0] in kept:
        assert (lower, upper) == (-np.inf, np.inf)
        assert len(kept) == len(points + gaps)
    else:
        limits = [float(min(kept)) / 10_000, float(max(kept)) / 10_000]
        np.testing.assert_allclose([lower, upper], limits, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(COUNTS, LEVELS)
def test_interval_excludes_zero_exactly_if_the_test_rejects(
    counts: list[int], level: float
) -> None:
    test = flipped(counts)
    for at in {level, min(test.p_value, 0.99), 0.999 * test.p_value}:
        lower, upper = test.interval(at)
        assert (lower > 0 or upper < 0) == (test.p_value <= at)


@pytest.mark.parametrize("n", [7, 14])
def test_p_value_agrees_with_scipy(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.003, 0.01, n)
    scipy_test = stats.permutation_test(
        (differences,),
        lambda x, axis: np.abs(np.sum(x, axis=axis)),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=2**n,
    )
    test = sign_flips(differences, np.random.default_rng(0))
    assert test.p_value == pytest.approx(scipy_test.pvalue, rel=1e-12)


@pytest.mark.parametrize(("n", "positive"), [(1, 1), (6, 6), (11, 9), (20, 3), (20, 10), (20, 20)])
def test_equal_sizes_give_the_binomial_sign_test(n: int, positive: int) -> None:
    differences = np.where(np.arange(n) < positive, 0.1, -0.1)
    test = sign_flips(differences, np.random.default_rng(0))
    assert test.p_value == pytest.approx(stats.binomtest(positive, n).pvalue, rel=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(-0.1, 0.1, allow_subnormal=False), min_size=6, max_size=9),
    st.floats(-0.5, 0.5),
    st.floats(0.01, 100),
)
def test_interval_moves_turns_and_stretches_with_the_data(
    values: list[float], shift: float, scale: float
) -> None:
    differences = np.array(values)
    test = sign_flips(differences, np.random.default_rng(0))
    assert test.p_value >= smallest_p(len(values)) == 2 / 2 ** len(values)
    lower, upper = test.interval(0.04)
    assert lower - 1e-12 <= test.difference <= upper + 1e-12

    def interval(changed: np.ndarray) -> tuple[float, float]:
        return sign_flips(changed, np.random.default_rng(0)).interval(0.04)

    def close(a: float, b: float) -> list[object]:
        return [pytest.approx(limit, rel=1e-9, abs=1e-9) for limit in (a, b)]

    assert list(interval(differences + shift)) == close(lower + shift, upper + shift)
    assert list(interval(scale * differences)) == close(scale * lower, scale * upper)
    assert interval(-differences) == (-upper, -lower)
    assert list(interval(differences[::-1])) == close(lower, upper)


@settings(deadline=None, max_examples=40)
@given(COUNTS)
def test_p_value_ignores_sign_scale_and_order(counts: list[int]) -> None:
    p = flipped(counts).p_value
    assert flipped([-count for count in counts]).p_value == p
    assert flipped([7 * count for count in counts]).p_value == p
    assert flipped(counts[::-1]).p_value == p


def test_random_flips_come_close_to_all_flips() -> None:
    differences = np.random.default_rng(5).normal(0.004, 0.01, 22)
    sums = np.zeros(1)  # of all 2²² flips
    for d in differences:
        sums = np.concatenate([sums - d, sums + d])
    exact = np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-12)
    test = sign_flips(differences, np.random.default_rng(0))
    assert len(test.low) == 100_001
    assert test.p_value == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 100_000))
    # The limits of the interval are shifts at which all flips give p = level.
    for limit in test.interval(0.04):
        sums = np.zeros(1)
        for d in differences - limit:
            sums = np.concatenate([sums - d, sums + d])
        share = np.mean(np.abs(sums) >= abs((differences - limit).sum()) - 1e-12)
        assert share == pytest.approx(0.04, abs=0.003)


@pytest.mark.parametrize("level", [0.04, 0.005, 0.04 / 3])
def test_random_flips_keep_test_and_interval_together(level: float) -> None:
    generator = np.random.default_rng(1)
    rejected = 0
    for _ in range(40):
        test = sign_flips(np.round(generator.normal(0.005, 0.01, 24), 3), generator)
        lower, upper = test.interval(level)
        assert (lower > 0 or upper < 0) == (test.p_value <= level)
        rejected += test.p_value <= level
    assert 0 < rejected < 40  # both sides were seen


def test_random_flips_follow_their_generator_and_count_the_data_itself() -> None:
    differences = np.random.default_rng(2).normal(0.004, 0.01, 30)
    p = [sign_flips(differences, np.random.default_rng(seed)).p_value for seed in (0, 0, 1)]
    assert p[0] == p[1] != p[2]
    certain = sign_flips(np.full(60, 0.01), np.random.default_rng(0))
    assert certain.p_value == smallest_p(60) == 1 / 100_001


def test_five_pairs_never_exclude_anything_and_six_do() -> None:
    generator = np.random.default_rng(0)
    assert sign_flips(np.full(5, 0.3), generator).interval(0.04) == (-np.inf, np.inf)
    np.testing.assert_allclose(sign_flips(np.full(6, 0.3), generator).interval(0.04), 0.3)


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ([], r"shape \(0,\)"),
        ([[0.1]], r"shape \(1, 1\)"),
        ([0.1, np.nan], "difference 1 is nan"),
        ([np.inf], "difference 0 is inf"),
    ],
)
def test_bad_differences_are_named(differences: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sign_flips(differences, np.random.default_rng(0))


def test_bad_levels_and_counts_are_named() -> None:
    with pytest.raises(UserError, match="level is 4"):
        flipped([1, 2]).interval(4)
    with pytest.raises(UserError, match="0 pairs"):
        smallest_p(0)


def test_statistics_need_no_deep_learning_framework() -> None:
    code = "import sys, normlab.statistics; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)
