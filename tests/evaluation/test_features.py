"""An output layer fitted to features: against an oracle, and in what it chooses."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from normlab.evaluation.features import PENALTIES, fit_head

N, D, K = 90, 12, 3


def sample(
    n: int = N, d: int = D, signal: float = 1.0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, n)
    centres = rng.normal(size=(K, d)) * signal
    return (rng.normal(size=(n, d)) * 3 + centres[labels] + 5).astype(np.float32), labels


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "d"), [(N, D), (20, 50)])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_fit_is_where_the_objective_is_lowest(
    bias: bool, n: int, d: int, weighted: bool
) -> None:
    """The objective anew, in PyTorch: its slope is 0 there, and it is convex."""
    x, labels = sample(n, d)
    weights = np.array([1.0, 2.0, 0.5]) if weighted else None
    head = fit_head(x, labels, K, class_weights=weights, bias=bias, penalties=(0.03,))
    spread = np.sqrt(x.astype(np.float64).var(0).mean())
    w = torch.tensor(head.weights * spread, requires_grad=True)
    c = torch.tensor(head.bias, requires_grad=True)
    z = torch.from_numpy(x.astype(np.float64))
    logits = (z / spread) @ w.T + c
    weight = None if weights is None else torch.tensor(weights)
    loss = cross_entropy(logits, torch.from_numpy(labels), weight) + 0.03 / 2 * (w**2).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    assert w.grad.abs().max() < 1e-4
    if bias:
        assert c.grad is not None
        assert c.grad.abs().max() < 1e-4
    else:
        assert not head.bias.any()


def test_noise_asks_for_a_strong_penalty_and_a_clear_signal_for_a_weak_one() -> None:
    noise, labels = sample(200, 60, signal=0.0)
    clear, same = sample(200, 60, signal=3.0)
    strong, weak = fit_head(noise, labels, K).penalty, fit_head(clear, same, K).penalty
    assert strong >= 1 > weak
    assert {strong, weak} <= set(PENALTIES)


def test_the_same_seed_chooses_the_same() -> None:
    x, labels = sample(60, 20)
    first, second = (fit_head(x, labels, K, seed=4) for _ in range(2))
    assert first.losses == second.losses
    assert np.array_equal(first.weights, second.weights)


def test_features_that_never_vary_do_no_harm() -> None:
    x, labels = sample()
    x[:, 0] = 7
    head = fit_head(x, labels, K)
    assert np.isfinite(head.weights).all()
    assert (x @ head.weights.T + head.bias).argmax(1)[labels == 0].tolist().count(0) > 10
