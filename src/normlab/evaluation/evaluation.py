"""Score a classifier on the test images: compute, keep a frozen result; drawing is elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normlab.data import ImageData
from normlab.data.loading import PUBLIC
from normlab.errors import DataError
from normlab.evaluation import metrics
from normlab.evaluation.forward import logits_of
from normlab.runs import Run
from normlab.statistics import accuracy_interval
from normlab.text import listed

CIFAR10_LIMITS = (
    "Near-duplicates of 3.3 % of CIFAR-10's test images are in its training set (ciFAIR).",
    "54 of its test labels are confirmed errors (Northcutt et al. 2021).",
    "On freshly collected test images such classifiers lose 4 to 15 points (CIFAR-10.1).",
)
OWN_LIMITS = ("The interval holds for pictures like these test pictures, and for no others.",)


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in equal-width bins (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Attributes:
        confidence, accuracy: means in each bin; NaN where a bin is empty.
        count: images in each bin.
        error: expected calibration error, Σ count/N · |accuracy − confidence|.
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    count: NDArray[np.int64]
    error: float


@dataclass(frozen=True)
class Evaluation:
    """A classifier's answers on N test images of K classes, and its scores.

    Attributes:
        run: the run's folder, or the name of what was evaluated.
        views: how many versions of a picture were seen: `single`, `flip`, `shift` or `unsure`.
        probabilities: (N, K).
        labels: (N,).
        loss: mean cross-entropy in nats.
        interval: 95 % Wilson interval of `accuracy` over test pictures.
        confusion: (K, K) counts, label by answer.
        files: N names of the files of the test images, if they came from files.
    """

    run: str
    weights: str
    views: str
    data: str
    class_names: tuple[str, ...]
    probabilities: NDArray[np.float64]
    labels: NDArray[np.int64]
    loss: float
    accuracy: float
    interval: tuple[float, float]
    confusion: NDArray[np.int64]
    calibration: Calibration
    limits: tuple[str, ...]
    files: tuple[str, ...] | None = None

    @property
    def predictions(self) -> NDArray[np.int64]:
        """The most probable class of each image, (N,)."""
        answers: NDArray[np.int64] = self.probabilities.argmax(1)
        return answers

    @property
    def class_accuracy(self) -> NDArray[np.float64]:
        """Accuracy on the images of each class (K,); NaN for a class without test images."""
        return metrics.class_accuracy(self.confusion)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of `class_accuracy` over the classes that have test images."""
        return metrics.balanced_accuracy(self.confusion)

    @property
    def macro_f1(self) -> float:
        """Mean of the classes' F1 scores, over the classes that occur as label or answer."""
        return metrics.macro_f1(self.confusion)

    @property
    def weakest(self) -> tuple[str, float, str, float]:
        """The class with the lowest accuracy, that, what it is taken for most, how often."""
        worst = int(np.nanargmin(self.class_accuracy))
        row = self.confusion[worst].copy()
        total = row.sum()
        row[worst] = -1
        taken = int(row.argmax())
        share = max(int(row[taken]), 0) / total
        names = self.class_names
        return names[worst], float(self.class_accuracy[worst]), names[taken], share

    def surest_mistakes(self, count: int = 24) -> NDArray[np.int64]:
        """Indices of the wrong answers with the highest probability, surest first."""
        wrong = np.flatnonzero(self.predictions != self.labels)
        return wrong[np.argsort(-self.probabilities[wrong].max(1), kind="stable")][:count]

    def likely_mislabelled(self, label: int, count: int = 8) -> NDArray[np.int64]:
        """Indices of the images of class `label` whose label the classifier believes least.

        Ranked by the probability of the label minus that of the best other class (the normalised
        margin of Northcutt et al. 2021, arXiv 1911.00068); only images that it answers otherwise.
        """
        own = np.flatnonzero((self.labels == label) & (self.predictions != label))
        margin = self.probabilities[own, label] - self.probabilities[own].max(1)
        return own[np.argsort(margin, kind="stable")][:count]

    def as_dict(self) -> dict[str, Any]:
        """The scores as JSON; accuracies are fractions."""
        weakest, accuracy, taken_for, share = self.weakest
        accuracies = [None if np.isnan(a) else float(a) for a in self.class_accuracy]
        return {
            "run": self.run,
            "weights": self.weights,
            "views": self.views,
            "data": self.data,
            "test_images": len(self.labels),
            "test_accuracy": self.accuracy,
            "test_accuracy_interval": list(self.interval),
            "test_loss": self.loss,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "class_accuracy": dict(zip(self.class_names, accuracies, strict=True)),
            "confusion": self.confusion.tolist(),
            "calibration_error": self.calibration.error,
            "weakest_class": {
                "name": weakest,
                "accuracy": accuracy,
                "taken_for": taken_for,
                "share": share,
            },
            "surest_mistake": self._surest_mistake(),
            "limits": list(self.limits),
        }

    def _surest_mistake(self) -> dict[str, Any] | None:
        found = self.surest_mistakes(1)
        if not len(found):
            return None
        index = int(found[0])
        answer = int(self.predictions[index])
        return {
            "index": index,
            "file": None if self.files is None else self.files[index],
            "label": self.class_names[self.labels[index]],
            "answer": self.class_names[answer],
            "probability": float(self.probabilities[index, answer]),
        }

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"Test loss: {self.loss:.4f}\n"
            f"Test accuracy: {self.accuracy:.4f} (95 % interval over test pictures "
            f"{low:.4f} to {high:.4f}, N = {len(self.labels):,})"
        )


def calibrate(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], bins: int = 15
) -> Calibration:
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


def assess(
    logits: Tensor | NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    run: str,
    weights: str,
    views: str = "single",
    data: str,
    class_names: tuple[str, ...],
    limits: tuple[str, ...],
    files: tuple[str, ...] | None = None,
) -> Evaluation:
    """Turn logits (N, K) and labels (N,) into an `Evaluation`."""
    logits, truth = torch.as_tensor(logits), labels.astype(np.int64)
    confusion = metrics.confusion_matrix(truth, logits.argmax(1).numpy(), len(class_names))
    probabilities = np.exp(metrics.log_softmax(logits))
    return Evaluation(
        run=run,
        weights=weights,
        views=views,
        data=data,
        class_names=class_names,
        probabilities=probabilities,
        labels=truth,
        loss=metrics.cross_entropy(logits, torch.from_numpy(truth)),
        accuracy=metrics.accuracy(confusion),
        interval=accuracy_interval(int(confusion.trace()), len(truth)),
        confusion=confusion,
        calibration=calibrate(probabilities, truth),
        limits=limits,
        files=files,
    )


def limits_of(data: str) -> tuple[str, ...]:
    """What to say beside any score on the data set of this name."""
    return CIFAR10_LIMITS if data in PUBLIC else OWN_LIMITS


def evaluate(
    run: Run,
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
    *,
    weights: str = "kept",
    views: str = "single",
) -> Evaluation:
    """Score `run` on the test images of `data`, or of the data it was trained on.

    With `views` other than `single` (see `logits_of`) a picture is answered
    from several versions of it, which is more work and not comparable with a single view.

    Raises:
        DataError: the data cannot be had, or has other classes or another image size.
    """
    images = run.task.load(data)
    size = images.x_test.shape[1:3]
    if images.class_names != run.task.class_names:
        raise DataError(
            f"data {images.name!r} has other classes ({listed(images.class_names)}) than "
            f"run {run.path} ({listed(run.task.class_names)}): give data with the same ones"
        )
    if size != (run.task.image_size, run.task.image_size):
        raise DataError(
            f"data {images.name!r} has images of {size[0]} × {size[1]} pixels, run {run.path} "
            f"takes {run.task.image_size} × {run.task.image_size}: resize them"
        )
    weights = run.kept if weights == "kept" else weights
    return assess(
        logits_of(run.model(weights), images.x_test, views=views),
        images.y_test,
        run=str(run.path),
        weights=weights,
        views=views,
        data=images.name,
        class_names=images.class_names,
        limits=limits_of(images.name),
        files=images.files_test,
    )
