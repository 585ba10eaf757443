"""Confident learning: a second implementation, planted wrong labels, folds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normlab import recipes
from normlab.curation.labels import by_regression, by_training, doubt, folds_of, for_few, together


def slowly(labels: list[int], p: np.ndarray) -> float:
    """The estimate, picture by picture, by equations 1 and 2 of arXiv 1911.00068."""
    k = p.shape[1]
    threshold = {}
    for j in range(k):
        own = [p[i, j] for i in range(len(labels)) if labels[i] == j]
        if own:
            threshold[j] = sum(own) / len(own)
    wrong = 0.0
    for label in threshold:
        held = []
        for i in range(len(labels)):
            above = [j for j in threshold if p[i, j] >= threshold[j]]
            if labels[i] == label and above:
                held.append(max(above, key=lambda j: (p[i, j], -j)))
        if held:
            wrong += labels.count(label) * sum(j != label for j in held) / len(held)
    return wrong


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 30), st.integers(0, 10_000))
def test_the_estimate_is_that_of_the_paper(k: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(k, 0.5), n)
    labels = rng.integers(0, k, n)
    found = doubt(labels, p)
    assert found.estimate == pytest.approx(slowly(labels.tolist(), p))
    assert found.count == int(min(round(found.estimate), 0.1 * n))
    assert sorted(found.order.tolist()) == list(range(n))
    assert (np.diff(p[found.order, labels[found.order]]) >= 0).all()
    assert (found.suggested != labels).all()


def test_planted_labels_come_first() -> None:
    """Three clouds of points, 5 % with a wrong label: all are found by looking at 6 %."""
    rng = np.random.default_rng(0)
    truth = np.arange(900) % 3
    x = rng.normal(size=(900, 8)).astype(np.float32)
    x[np.arange(900), truth] += 6
    wrong = rng.choice(900, 45, replace=False)
    labels = truth.copy()
    labels[wrong] = (labels[wrong] + 1) % 3
    fold = folds_of(labels, np.arange(900), 5)
    found = doubt(labels, by_regression(x, labels, 3, fold, 1.0))
    looked_at = set(found.order[:54].tolist())
    assert len(looked_at & set(wrong.tolist())) >= 43
    assert (found.suggested[wrong] == truth[wrong]).mean() > 0.95
    assert found.estimate == pytest.approx(45, abs=20)


def test_folds_keep_groups_together_and_classes_in_proportion() -> None:
    labels = np.repeat([0, 1, 2], [80, 40, 20])
    groups = np.arange(140)
    groups[[3, 90, 130]] = 3
    fold = folds_of(labels, groups, 5)
    assert len(set(fold[[3, 90, 130]].tolist())) == 1
    for k in range(5):
        counts = np.bincount(labels[fold == k], minlength=3)
        assert (np.abs(counts - [16, 8, 4]) <= 1).all()


@pytest.mark.parametrize("groups", [2, 3, 5, 9])
def test_few_groups_still_fill_folds(groups: int) -> None:
    """Whatever one holds out, there is something left to learn from."""
    number = np.arange(40) % groups
    fold = folds_of(np.repeat([0, 1], 20), number, 3)
    assert len(np.unique(fold)) == min(groups, 3)
    for one in range(groups):
        assert len(np.unique(fold[number == one])) == 1


def test_training_answers_for_pictures_it_has_not_seen() -> None:
    """Classes of two colours: answers are right, also where the picture's own label is wrong."""
    rng = np.random.default_rng(1)
    labels = np.arange(240) % 2
    pixels = rng.integers(0, 60, (240, 32, 32, 3)).astype(np.uint8)
    pixels[labels == 1, :, :, 0] += 120
    labels[:6] = 1 - labels[:6]
    fold = folds_of(labels, np.arange(240), 5)
    recipe = recipes.get("fast79").with_settings({"epochs": 4, "batch_size": 20})
    p = by_training(pixels, labels, 2, fold, recipe)
    assert p.sum(1) == pytest.approx(1)
    assert (p.argmax(1)[6:] == labels[6:]).mean() > 0.95
    assert (p.argmax(1)[:6] != labels[:6]).mean() > 0.8


def test_two_models_together_are_surer_where_they_agree() -> None:
    p = np.array([[0.8, 0.2], [0.8, 0.2]])
    q = np.array([[0.8, 0.2], [0.2, 0.8]])
    np.testing.assert_allclose(together(p, q), [[0.8, 0.2], [0.5, 0.5]])


def test_a_short_training_for_a_check_sees_no_picture_too_often() -> None:
    many, few = for_few(2_000, ("cat", "dog"), 64), for_few(80, ("cat", "dog"), 64)
    assert (many.least_steps, few.least_steps) == (500, 50)
    assert many.augmentation.flip
    assert not for_few(80, ("1", "2"), 64).augmentation.flip
