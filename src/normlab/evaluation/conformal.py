"""Sets of classes that hold the true one at a promised rate: split conformal prediction.

A class is in the set if its probability is not low beside those that held-out pictures gave to
their true classes (Vovk et al. 2005; with this score Sadinle et al. 2019, arXiv 1609.00451). The
promise holds on average over pictures, and over draws of the held-out ones, if both are drawn
alike; no other assumption is made, of the network least of all.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def lowest(values: Floats, rate: float) -> float:
    """What a new value reaches with a probability of at least `rate`, if it is drawn like `values`.

    The ⌊(n + 1)(1 − rate)⌋-th smallest of the n values; −∞ where n is too small for the rate.

    Args:
        values: (n,).
        rate: in (0, 1).
    """
    # Rounded, since (49 + 1)·(1 − 0.9) is 4.999… in binary.
    rank = int(np.floor(round((len(values) + 1) * (1 - rate), 9)))
    return float(np.sort(values)[rank - 1]) if rank else -np.inf


def lowest_by_class(
    of_label: Floats, labels: NDArray[np.integer], rate: float, num_classes: int
) -> NDArray[np.float64]:
    """How probable each class must be to be in a set (K,), so that the promise holds for each.

    A class with fewer than rate/(1 − rate) held-out pictures is in every set.

    Args:
        of_label: (n,) probabilities of the true classes `labels` (n,) of held-out pictures.
    """
    return np.array([lowest(of_label[labels == k], rate) for k in range(num_classes)])


def sets_of(probabilities: Floats, least: float | Floats) -> NDArray[np.bool_]:
    """Which classes are in each picture's set (N, K).

    The most probable class is always in: an empty set would help nobody, and a larger one keeps
    the promise.

    Args:
        probabilities: (N, K).
        least: one number, or one a class (K,).
    """
    inside: NDArray[np.bool_] = probabilities >= least
    inside[np.arange(len(probabilities)), probabilities.argmax(1)] = True
    return inside
