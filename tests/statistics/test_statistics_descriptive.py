"""Descriptive figures against closed forms, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri, stdtr

from normlab.errors import UserError
from normlab.statistics import (
    Description,
    accuracy_interval,
    describe,
    mcnemar,
    sign_flips,
)


def described(differences: np.ndarray, level: float = 0.05) -> Description:
    return describe(differences, level=level, generator=np.random.default_rng(0))


@pytest.mark.parametrize(("n", "level"), [(2, 0.05), (6, 0.04), (24, 0.005)])
def test_t_interval_leaves_half_the_level_on_each_side(n: int, level: float) -> None:
    d = np.random.default_rng(n).normal(0.01, 0.02, n)
    result = described(d, level)
    assert result.t_interval is not None
    error = np.sqrt(np.sum((d - d.mean()) ** 2) / (n - 1) / n)
    lower, upper = ((limit - d.mean()) / error for limit in result.t_interval)
    assert stdtr(n - 1, lower) == pytest.approx(level / 2)
    assert stdtr(n - 1, upper) == pytest.approx(1 - level / 2)


def test_wilcoxon_is_the_enumerated_share_and_leaves_zeros_out() -> None:
    d = np.array([0.011, -0.004, 0.023, 0.0, 0.002, -0.001, 0.017, 0.009])
    values = d[d != 0]
    ranks = np.argsort(np.argsort(np.abs(values))) + 1
    center = ranks.sum() / 2
    observed = abs(ranks[values > 0].sum() - center)
    reached = [
        abs(np.dot(signs, ranks) - center) >= observed
        for signs in itertools.product((0, 1), repeat=len(values))
    ]
    assert described(d).wilcoxon_p == pytest.approx(np.mean(reached))


def test_bca_agrees_with_its_formula() -> None:
    d = np.random.default_rng(3).exponential(0.01, 25)
    result = described(d)
    resampled = np.random.default_rng(9).choice(d, (40_000, 25)).mean(axis=1)
    bias = ndtri(np.mean(resampled < d.mean()))
    jackknife = (d.sum() - d) / 24
    skew = jackknife.mean() - jackknife
    acceleration = np.sum(skew**3) / (6 * np.sum(skew**2) ** 1.5)
    z = bias + ndtri([0.025, 0.975])
    limits = np.quantile(resampled, ndtr(bias + z / (1 - acceleration * z)))
    assert result.bca_interval is not None
    np.testing.assert_allclose(result.bca_interval, limits, atol=0.05 * d.std())
    assert described(d) == result  # the generator decides
    assert described(d[:19]).bca_interval is None


def test_detectable_difference_is_found_four_times_in_five() -> None:
    generator = np.random.default_rng(0)
    unit = generator.standard_normal(10)
    unit = (unit - unit.mean()) / unit.std(ddof=1)
    effect = described(unit, 0.04).detectable
    assert effect is not None
    found = [
        sign_flips(generator.normal(effect, 1, 10), generator).p_value <= 0.04 for _ in range(1000)
    ]
    assert 0.72 < np.mean(found) < 0.88
    assert described(unit[:5], 0.04).detectable is None


@pytest.mark.parametrize("n", [1, 2, 5, 20, 24])
@pytest.mark.parametrize("value", [0.0, 0.01])
def test_equal_differences_are_described_without_warnings(n: int, value: float) -> None:
    result = described(np.full(n, value))
    assert result.mean == pytest.approx(value)
    assert result.bca_interval is None
    if n > 1:
        assert result.t_interval is not None
        np.testing.assert_allclose(result.t_interval, value, atol=1e-12)
    else:
        assert result.sd is None
        assert result.t_interval is None
    if value == 0:
        assert result.wilcoxon_p == 1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=26))
def test_any_tied_differences_are_described_with_finite_figures(counts: list[int]) -> None:
    result = described(np.array(counts) / 1000)
    figures = [result.wilcoxon_p, *(result.t_interval or ()), *(result.bca_interval or ())]
    assert all(math.isfinite(figure) for figure in figures)
    assert 0 <= result.wilcoxon_p <= 1


def test_describe_names_what_is_wrong() -> None:
    with pytest.raises(UserError, match="difference 0 is nan"):
        described(np.array([np.nan]))
    with pytest.raises(UserError, match="level is 95"):
        described(np.ones(3), 95)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (3, 3), (4, 11), (60, 90)])
def test_mcnemar_is_the_binomial_tail(b: int, c: int) -> None:
    first = np.array([True] * (7 + b) + [False] * (c + 2))
    other = np.array([True] * 7 + [False] * b + [True] * c + [False] * 2)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    result = mcnemar(first, other)
    assert (result.only_first, result.only_other) == (b, c)
    assert result.p_value == pytest.approx(min(1, 2 * tail))


def test_mcnemar_needs_the_same_images() -> None:
    with pytest.raises(UserError, match=r"\(3,\) and \(4,\)"):
        mcnemar(np.ones(3), np.ones(4))


@settings(deadline=None)
@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_limits_solve_the_score_equation(
    total: int, share: float, confidence: float
) -> None:
    correct = round(share * total)
    z = ndtri((1 + confidence) / 2)
    lower, upper = accuracy_interval(correct, total, confidence)
    assert 0 <= lower <= correct / total <= upper <= 1
    for p in (lower, upper):
        # (p̂ − p)² = z² p (1 − p) / N
        score = (correct / total - p) ** 2 * total - z**2 * p * (1 - p)
        assert score == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(("correct", "total"), [(-1, 10), (11, 10), (0, 0)])
def test_impossible_counts_are_named(correct: int, total: int) -> None:
    with pytest.raises(UserError, match=f"{correct} correct of {total}"):
        accuracy_interval(correct, total)
    with pytest.raises(UserError, match="confidence is 95"):
        accuracy_interval(1, 2, 95)
