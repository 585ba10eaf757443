"""Probabilities, thresholds and sets beside what they promise: by hand, and on drawn data."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import softmax
from scipy.stats import binom, binomtest
from torch import nn

from normlab.data.batches import Split
from normlab.errors import DataError, UserError
from normlab.evaluation import abstention, calibration, conformal, held_out
from normlab.evaluation.doubt import UNDECIDED, UNLIKE, Doubt
from normlab.evaluation.familiarity import answers_of, class_features, familiarity
from normlab.layers import BatchNorm


def doubt(
    probability: list[float], right: list[bool], near: list[float] | None = None, **more: Any
) -> Doubt:
    return Doubt(
        weights="last",
        temperature=1.0,
        label=tuple(range(len(right))) if "label" not in more else more.pop("label"),
        probability=tuple(probability),
        right=tuple(right),
        of_label=tuple(more.pop("of_label", probability)),
        familiarity=tuple(near or ()),
        **more,
    )


# Calibration.


def test_scores_of_probabilities_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    labels = np.array([0, 1, 1])
    found = calibration.proper_scores(np.log(p), labels)
    assert found.loss == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.8)) / 3)
    assert found.brier == pytest.approx((0.01 + 0.01 + 0.36 + 0.36 + 0.04 + 0.04) / 3)
    # Each in a bin of its own: right, wrong, right.
    assert found.error == pytest.approx((0.1 + 0.6 + 0.2) / 3)


def test_the_temperature_that_was_put_in_is_found() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (40_000, 5))
    labels = (z + rng.gumbel(size=z.shape)).argmax(1)  # drawn from softmax(z)
    for temperature in (0.5, 1.0, 3.0):
        assert calibration.fit_temperature(z * temperature, labels) == pytest.approx(
            temperature, rel=0.03
        )


def test_the_temperature_is_where_the_gradient_is_zero() -> None:
    """The derivative of the loss by 1/T, written out: mean of E[z] − z[target]."""
    rng = np.random.default_rng(1)
    z = rng.normal(0, 3, (60, 4))
    labels, n = (z + 2 * rng.gumbel(size=z.shape)).argmax(1), 60
    wanted = (n * z[np.arange(n), labels] + z.mean(1)) / (n + 1)
    root = brentq(lambda b: float(((softmax(b * z, axis=1) * z).sum(1) - wanted).mean()), 1e-3, 20)
    assert 1 / calibration.fit_temperature(z, labels) == pytest.approx(root, rel=1e-4)


def test_a_handful_of_right_answers_is_no_certainty() -> None:
    z = np.array([[4.0, 0.0]] * 10)
    t = calibration.fit_temperature(z, np.zeros(10, int))
    # Platt: of 10 right ones, 10.5 of 11 are expected.
    assert softmax(z[0] / t)[0] == pytest.approx(10.5 / 11, abs=1e-4)


# Abstention.


def test_risk_and_coverage_by_hand() -> None:
    curve = abstention.risk_coverage(
        np.array([0.9, 0.7, 0.8, 0.7]), np.array([True, False, True, True])
    )
    assert curve.threshold.tolist() == [0.9, 0.8, 0.7]
    assert curve.answered.tolist() == [1, 2, 4]
    assert curve.right.tolist() == [1, 2, 3]
    assert curve.coverage.tolist() == [0.25, 0.5, 1]
    assert curve.accuracy.tolist() == [1, 1, 0.75]
    assert curve.area == pytest.approx((0 + 0 + 2 * 0.25) / 4)


@pytest.mark.parametrize(("right", "total"), [(0, 5), (1, 1), (37, 40), (95, 100), (59, 59)])
def test_the_bound_is_exact(right: int, total: int) -> None:
    bound = abstention.lower_bound(right, total, 0.05)
    if right == 0:
        assert bound == 0
        return
    # At the bound, so many or more right ones have a probability of 5 %.
    assert binom.sf(right - 1, total, bound) == pytest.approx(0.05)
    two_sided = binomtest(right, total).proportion_ci(0.9, method="exact")
    assert bound == pytest.approx(two_sided.low)


def test_what_a_rate_takes() -> None:
    assert abstention.needed(0.95) == 86
    for n in (85, 86):
        curve = abstention.risk_coverage(np.full(n, 0.9), np.ones(n, bool))
        assert (abstention.choose_threshold(curve, 0.95) is not None) is (n >= 86)


def test_the_threshold_keeps_its_promise() -> None:
    """Of 400 draws of held-out pictures no more than 5 % end at a threshold that is too low."""
    rng = np.random.default_rng(0)
    grid = np.linspace(0.5, 1, 2001)  # p is uniform on it, and means what it says
    broken, answered = 0, []
    for _ in range(400):
        p = rng.choice(grid, 500)
        curve = abstention.risk_coverage(p, rng.random(500) < p)
        threshold = abstention.choose_threshold(curve, 0.85)
        if threshold is not None:
            answered.append(threshold.answered)
            broken += grid[grid >= threshold.least].mean() < 0.85
            assert threshold.bound >= 0.85
    assert len(answered) > 350
    assert broken <= 0.05 * 400
    assert 120 <= np.median(answered) <= 300  # 300 have p ≥ 0.7, and those are right at 0.85


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=200),
    st.floats(0.05, 0.99),
)
def test_a_threshold_is_one_that_its_own_figures_show(
    rows: list[tuple[int, bool]], rate: float
) -> None:
    p, right = np.array([r[0] / 20 for r in rows]), np.array([r[1] for r in rows])
    found = abstention.choose_threshold(abstention.risk_coverage(p, right), rate)
    if found is None:
        return
    chosen = p >= found.least
    assert (found.answered, found.right) == (chosen.sum(), right[chosen].sum())
    alone = abstention.lower_bound(found.right, found.answered, 0.05)
    assert rate <= found.bound <= alone + 1e-12


def test_a_rate_that_cannot_be_shown_says_what_can() -> None:
    known = doubt([0.9] * 30, [True] * 30)
    with pytest.raises(UserError) as error:
        known.rule(0.95)
    assert "30 pictures held out" in str(error.value)
    assert "it takes 86" in str(error.value)
    assert "up to 86" in str(error.value)
    assert known.rule(0.86).threshold is not None


# Sets.


def test_quantiles_by_hand() -> None:
    values = np.arange(1, 20) / 20  # 19 of them
    assert conformal.lowest(values, 0.95) == values[0]  # ⌊20·0.05⌋ = 1
    assert conformal.lowest(values, 0.9) == values[1]
    assert conformal.lowest(values[:18], 0.95) == -np.inf
    assert conformal.lowest(np.arange(49.0), 0.9) == 4  # 50·0.1 is 5, not 4.999…


def test_sets_hold_the_true_class_at_their_rate() -> None:
    """Over draws of 60 held-out pictures, the mean coverage is in [rate, rate + 1/61]."""
    rng = np.random.default_rng(0)
    k, rate, covered = 4, 0.9, []
    by_class: list[list[float]] = [[] for _ in range(k)]

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, k, n)
        z = rng.normal(0, 1, (n, k))
        z[np.arange(n), labels] += np.array([3.0, 1.0, 0.2, 2.0])[labels]
        return softmax(2.5 * z, axis=1), labels  # far too sure, which sets have to bear

    for _ in range(300):
        p, labels = draw(120)
        q, truth = draw(400)
        of_label = p[np.arange(120), labels]
        inside = conformal.sets_of(q, conformal.lowest(of_label, rate))
        covered.append(inside[np.arange(400), truth].mean())
        least = conformal.lowest_by_class(of_label, labels, rate, k)
        hit = conformal.sets_of(q, least)[np.arange(400), truth]
        for c in range(k):
            by_class[c].append(hit[truth == c].mean())
    error = np.std(covered) / math.sqrt(len(covered))
    assert rate - 3 * error <= np.mean(covered) <= rate + 1 / 121 + 3 * error
    for values in by_class:
        assert np.mean(values) >= rate - 0.01


def test_a_set_is_never_empty_and_a_rare_class_is_always_in() -> None:
    p = np.array([[0.5, 0.3, 0.2]])
    assert conformal.sets_of(p, 0.9).tolist() == [[True, False, False]]
    labels = np.array([0] * 30 + [1])
    least = conformal.lowest_by_class(np.full(31, 0.9), labels, 0.9, 3)
    assert least.tolist() == [0.9, -np.inf, -np.inf]
    assert conformal.sets_of(p, least).tolist() == [[True, True, True]]


# What a network knows of pictures.


class Net(nn.Module):
    """Mean colours as features, with a normaliser whose statistics must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNorm(3)
        self.output = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.output(self.norm(x).amax((2, 3)))
        return answers


def coloured(rng: np.random.Generator, n: int, channels: tuple[int, ...]) -> Split:
    labels = np.arange(n) % len(channels)
    images = rng.integers(0, 60, (n, 8, 8, 3), np.uint8)
    images[np.arange(n), ..., np.array(channels)[labels]] += 150
    return Split(images, labels.astype(np.int64))


def test_the_angle_tells_where_length_does_not() -> None:
    means = class_features(np.array([[1.0, 0], [3, 0], [0, 2]]), np.array([0, 0, 1]), 3)
    assert means.tolist() == [[1, 0], [0, 1], [0, 0]]
    found = familiarity(np.array([[9.0, 0], [1, 1], [0, 0]]), means)
    np.testing.assert_allclose(found, [1, math.sqrt(0.5), 0])


def test_learning_leaves_the_network_and_tells_another_colour() -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    net = Net().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    learnt, means = held_out.learn(
        net, coloured(rng, 200, (0, 2)), coloured(rng, 100, (0, 2)), 2, "last"
    )
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert means is not None
    rule = learnt.rule()
    for channels, expected in (((0, 2), 0.05), ((1,), 1.0)):
        logits, features = answers_of(net, coloured(rng, 400, channels).images)
        assert features is not None
        p = softmax(logits.numpy(), axis=1)
        doubts = rule.doubts(p, familiarity(features, means))
        assert np.mean([d == UNLIKE for d in doubts]) == pytest.approx(expected, abs=0.05)


def test_the_rule_in_words() -> None:
    near = [i / 100 for i in range(1, 101)]
    known = doubt([0.9] * 100, [True] * 100, near)
    rule = known.rule()
    p = np.array([[0.9, 0.1, 0], [0.4, 0.3, 0.3], [0.9, 0.1, 0]])
    assert rule.doubts(p, np.array([0.5, 0.5, 0.04])) == [None, UNDECIDED, UNLIKE]
    assert rule.doubts(p) == [None, UNDECIDED, None]
    assert not doubt([0.9] * 18, [True] * 18, near[:18]).tells_unlike
    assert doubt([0.9] * 18, [True] * 18, near[:18]).rule().doubts(p, np.zeros(3))[0] is None


def test_the_record_survives_its_file_and_refuses_others() -> None:
    known = doubt([0.75, 0.5], [True, False], [0.25, -1.0], label=(1, 0))
    values = known.as_dict()
    assert Doubt.from_dict(values, "it") == known
    wrong: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": float("nan")},
        {"probability": [0.5, 1.5]},
        {"probability": []},
        {"right": [1, 0]},
        {"familiarity": [0.1]},
        {"label": [-1, 0]},
        {"label": [0]},
    ]
    for change in wrong:
        with pytest.raises(DataError, match="it is not as normlab wrote it"):
            Doubt.from_dict({**values, **change}, "it")
