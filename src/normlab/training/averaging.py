"""Averaged weights: an exponential moving average of the parameters over the steps.

    θ̄ ← d·θ̄ + (1 − d)·θ,  d = min(ema, t/(t + 9)) after step t

The early steps, whose weights are soon outdated, count less (as in TensorFlow's
ExponentialMovingAverage); without normalisation or with it, θ̄ is what is scored and kept. Running
statistics belong to θ and not to θ̄, so averaged weights get population statistics first
(Izmailov et al. 2018, arXiv 1803.05407, section 3.2).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.core.ranks import ALONE, Ranks
from normlab.evaluation.forward import untouched
from normlab.evaluation.population import evenly, population_moments, set_statistics

WARM_UP = 9  # steps: half of the average is younger than about t/2 while it warms up


@torch.no_grad()
def update(average: dict[str, Tensor], model: nn.Module, ema: float, step: int) -> None:
    """Move `average`, parameters by name, towards the model's after step number `step` (from 1)."""
    parameters = dict(model.named_parameters())
    if not average:
        average |= {name: p.detach().clone() for name, p in parameters.items()}
        return
    share = 1 - min(ema, step / (step + WARM_UP))
    torch._foreach_lerp_(list(average.values()), [parameters[name] for name in average], share)


@torch.no_grad()
def use_average(
    model: nn.Module,
    average: dict[str, Tensor],
    images: NDArray[np.uint8],
    ranks: Ranks = ALONE,
) -> None:
    """Give the model its averaged weights, and the statistics that these have on `images`.

    Args:
        images: (N, H, W, 3); at most 4,096 of them are taken, evenly.
    """
    parameters = dict(model.named_parameters())
    for name, value in average.items():
        parameters[name].copy_(value)
    some = evenly(images)
    if len(some) > 1:
        set_statistics(model, population_moments(model, some, ranks=ranks))


@contextmanager
def averaged(
    model: nn.Module,
    average: dict[str, Tensor],
    images: NDArray[np.uint8],
    ranks: Ranks = ALONE,
) -> Iterator[None]:
    """Load the averaged weights into the model for the duration of the `with` block.

    Does nothing if there are none.
    """
    if not average:
        yield
        return
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].detach().clone() for name in average}
    with untouched(model):
        try:
            use_average(model, average, images, ranks)
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    parameters[name].copy_(value)
