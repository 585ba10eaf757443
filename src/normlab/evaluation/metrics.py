"""The scores of a classifier: the only accuracy and the only cross-entropy there are here.

Accuracies come from a confusion matrix (K, K) of counts, label by answer; losses from logits, in
float64.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from normlab import kernels

Counts = NDArray[np.int64]


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """Mean over images of −log softmax(logits)[label], in nats, computed in float64.

    Args:
        logits: (N, K).
        labels: (N,).
    """
    return F.cross_entropy(logits.double(), labels).item()


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which images are answered rightly (N,): the largest of their K logits is the label's."""
    return logits.argmax(1) == labels


def count_right(logits: Tensor, labels: Tensor) -> int:
    """How many images are answered rightly; after each training step, where little time counts."""
    if kernels.layout(logits) is None or labels.dtype is not torch.int64:
        return int(right(logits, labels).sum())
    return kernels.right(logits, labels.contiguous())


def confusion_matrix(
    labels: NDArray[np.integer], answers: NDArray[np.integer], num_classes: int
) -> Counts:
    """Counts (K, K), label by answer, of labels (N,) and answers (N,)."""
    index = labels.astype(np.int64) * num_classes + answers
    return np.bincount(index, minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy(confusion: Counts) -> float:
    """Share of right answers."""
    return float(confusion.trace() / confusion.sum())


def class_accuracy(confusion: Counts) -> NDArray[np.float64]:
    """Accuracy on the images of each class (K,); NaN for a class without images."""
    count = confusion.sum(1)
    return np.where(count > 0, confusion.diagonal() / np.maximum(count, 1), np.nan)


def balanced_accuracy(confusion: Counts) -> float:
    """Mean of `class_accuracy` over the classes that have images."""
    return float(np.nanmean(class_accuracy(confusion)))


def macro_f1(confusion: Counts) -> float:
    """Mean over classes of 2·right/(labels + answers).

    A class that is neither a label nor an answer has no F1 and does not count.
    """
    total = confusion.sum(0) + confusion.sum(1)
    occurs = total > 0
    return float((2 * confusion.diagonal()[occurs] / total[occurs]).mean())


def log_softmax(logits: Tensor) -> NDArray[np.float64]:
    """Log-probabilities (N, K) of logits (N, K), in float64."""
    return torch.log_softmax(logits.double(), 1).numpy()
