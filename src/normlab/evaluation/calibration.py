"""Do probabilities mean what they say? Measured, and put right by one temperature.

Everything here is a function of probabilities or logits (N, K) and labels (N,), in NumPy alone.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import NDArray

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0  # temperatures beyond these say nothing new

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in equal-width bins (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Attributes:
        confidence, accuracy: means in each bin; NaN where a bin is empty.
        count: images in each bin.
        error: expected calibration error, Σ count/N · |accuracy − confidence|.
    """

    confidence: Floats
    accuracy: Floats
    count: NDArray[np.int64]
    error: float


@dataclass(frozen=True)
class Proper:
    """How good probabilities are, in figures that are better when smaller.

    Attributes:
        error: expected calibration error in `BINS` bins of equal width. It is above 0 by chance
            alone where there are few pictures.
        brier: Σₖ (pₖ − 1[k is the label])², the mean over pictures (Brier 1950); 0 to 2.
        loss: mean of −log p(label), in nats.
    """

    error: float
    brier: float
    loss: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"calibration error {self.error:.4f}, Brier {self.brier:.4f}, loss {self.loss:.4f}"


def calibrate(probabilities: Floats, labels: Labels, bins: int = BINS) -> Calibration:
    """Bin the answers by the probability of the chosen class and compare it with the accuracy."""
    top = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    index = np.minimum((top * bins).astype(np.int64), bins - 1)
    count = np.bincount(index, minlength=bins)
    divisor = np.maximum(count, 1)
    empty = count == 0
    confidence = np.where(empty, np.nan, np.bincount(index, top, bins) / divisor)
    accuracy = np.where(empty, np.nan, np.bincount(index, right, bins) / divisor)
    error = float(np.nansum(count * np.abs(accuracy - confidence)) / len(labels))
    return Calibration(confidence, accuracy, count, error)


def proper_scores(logits: NDArray[np.floating], labels: Labels, temperature: float = 1.0) -> Proper:
    """Score softmax(logits / temperature) against the labels."""
    log_p = scipy.special.log_softmax(logits.astype(np.float64) / temperature, axis=1)
    p = np.exp(log_p)
    of_label = np.arange(len(labels)), labels
    brier = (p**2).sum(1) - 2 * p[of_label] + 1
    return Proper(
        error=calibrate(p, labels).error,
        brier=float(brier.mean()),
        loss=float(-log_p[of_label].mean()),
    )


def fit_temperature(logits: NDArray[np.floating], labels: Labels) -> float:
    """The T for which softmax(logits / T) has the lowest loss on held-out pictures.

    Guo et al. 2017 (arXiv 1706.04599), section 4.2. A label counts N/(N + 1) and all classes alike
    1/(N + 1), after Platt 1999: without it a handful of pictures that are all answered rightly
    would ask for T = 0, which is to be certain of everything.

    Args:
        logits: (N, K), N at least 1.
        labels: (N,).
    """
    z, n = logits.astype(np.float64), len(labels)
    of_label = np.arange(n), labels

    def loss(log_t: float) -> float:
        log_p = scipy.special.log_softmax(z * np.exp(-log_t), axis=1)
        return float(-(n * log_p[of_label].mean() + log_p.mean()) / (n + 1))

    bounds = np.log(COLDEST), np.log(HOTTEST)
    found = scipy.optimize.minimize_scalar(
        loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(found.x))
