"""The training step: forward, loss, backward, update."""

import math

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normlab.errors import NonFiniteError
from normlab.evaluation.metrics import count_right
from normlab.training.captured import Captured
from normlab.training.optimisers import Optimizer


def train_step(
    model: nn.Module | Captured,
    optimizer: Optimizer,
    x: Tensor,  # (N, 3, H, W)
    labels: Tensor,  # (N,)
    rng: np.random.Generator,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,  # (K,)
) -> tuple[float, int]:
    """One update of the weights; returns the batch's mean loss and how many were right.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the weights are as before the step.
    """
    logits = model(x, rng)
    loss = cross_entropy(logits, labels, class_weights, label_smoothing=label_smoothing)
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteError(f"the loss is {value}")
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value, count_right(logits.detach(), labels)
