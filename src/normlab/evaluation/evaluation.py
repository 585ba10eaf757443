"""Score a classifier on the test images: compute, keep a frozen result; drawing is elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normlab.data import ImageData
from normlab.data.loading import PUBLIC
from normlab.evaluation import held_out, metrics
from normlab.evaluation.abstention import RiskCoverage, risk_coverage
from normlab.evaluation.calibration import (
    BINS,
    Calibration,
    Proper,
    calibrate,
    proper_scores,
)
from normlab.evaluation.doubt import Doubt
from normlab.evaluation.familiarity import answers_of, familiarity
from normlab.evaluation.forward import logits_of
from normlab.runs import Run, Start
from normlab.statistics import accuracy_interval

CIFAR10_LIMITS = (
    "Near-duplicates of 3.3 % of CIFAR-10's test images are in its training set (ciFAIR).",
    "54 of its test labels are confirmed errors (Northcutt et al. 2021).",
    "On freshly collected test images such classifiers lose 4 to 15 points (CIFAR-10.1).",
)
IMAGENET_LIMIT = (
    "The network began with what it had learnt from ImageNet's pictures. Many public folders of "
    "photographs hold some of the same ones: then it has seen test pictures before, and on others "
    "it will score less."
)
OWN_LIMITS = ("The interval holds for pictures like these test pictures, and for no others.",)


@dataclass(frozen=True)
class Evaluation:
    """A classifier's answers on N test images of K classes, and its scores.

    Attributes:
        run: the run's folder, or the name of what was evaluated.
        views: how many versions of a picture were seen: `single`, `flip`, `shift` or `unsure`.
        probabilities: (N, K), after the temperature.
        labels: (N,).
        loss: mean cross-entropy in nats of what was trained: without the temperature.
        interval: 95 % Wilson interval of `accuracy` over test pictures.
        confusion: (K, K) counts, label by answer.
        calibration: of the answers, after the temperature.
        uncalibrated: the same before it.
        before, after: how good the probabilities are without the temperature and with it.
        files: N names of the files of the test images, if they came from files.
        doubt: what the run's held-out pictures taught; None if nothing did.
        familiarity: (N,), if the run can tell.
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
    uncalibrated: Calibration
    before: Proper
    after: Proper
    limits: tuple[str, ...]
    files: tuple[str, ...] | None = None
    doubt: Doubt | None = None
    familiarity: NDArray[np.float64] | None = None

    @property
    def predictions(self) -> NDArray[np.int64]:
        """The most probable class of each image, (N,)."""
        answers: NDArray[np.int64] = self.probabilities.argmax(1)
        return answers

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which answers are right, (N,)."""
        found: NDArray[np.bool_] = self.predictions == self.labels
        return found

    @property
    def temperature(self) -> float:
        """What logits were divided by."""
        return 1.0 if self.doubt is None else self.doubt.temperature

    @cached_property
    def curve(self) -> RiskCoverage:
        """Risk and coverage if the test images are answered by their largest probability."""
        return risk_coverage(self.probabilities.max(1), self.right)

    def answered(self, rate: float | None = None) -> NDArray[np.bool_]:
        """Which of the images the run would answer, (N,); all if it has learnt no doubt.

        Raises:
            UserError: the rate cannot be shown; see `Doubt.rule`.
        """
        if self.doubt is None:
            return np.ones(len(self.labels), bool)
        doubts = self.doubt.rule(rate).doubts(self.probabilities, self.familiarity)
        return np.array([doubt is None for doubt in doubts])

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

    def worst_mistakes(self, label: int, count: int = 8) -> NDArray[np.int64]:
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
            "calibration": {
                "temperature": self.temperature,
                "bins": BINS,
                "before": self.before.as_dict(),
                "after": self.after.as_dict(),
            },
            "sure": self._sure(),
            "weakest_class": {
                "name": weakest,
                "accuracy": accuracy,
                "taken_for": taken_for,
                "share": share,
            },
            "surest_mistake": self._surest_mistake(),
            "limits": list(self.limits),
        }

    def _sure(self) -> dict[str, Any] | None:
        """How many images `predict` would answer by default, and how many of them rightly."""
        if self.doubt is None:
            return None
        answered = self.answered()
        return {
            "held_out": self.doubt.total,
            "answered": int(answered.sum()),
            "right": int(self.right[answered].sum()),
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
    doubt: Doubt | None = None,
    familiarity: NDArray[np.float64] | None = None,
) -> Evaluation:
    """Turn logits (N, K) and labels (N,) into an `Evaluation`; `doubt` brings the temperature."""
    logits, truth = torch.as_tensor(logits), labels.astype(np.int64)
    plain = logits.double().numpy()
    temperature = 1.0 if doubt is None else doubt.temperature
    confusion = metrics.confusion_matrix(truth, logits.argmax(1).numpy(), len(class_names))
    probabilities = np.exp(metrics.log_softmax(logits.double() / temperature))
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
        uncalibrated=calibrate(np.exp(metrics.log_softmax(logits)), truth),
        before=proper_scores(plain, truth),
        after=proper_scores(plain, truth, temperature),
        limits=limits,
        files=files,
        doubt=doubt,
        familiarity=familiarity,
    )


def limits_of(data: str, start: Start | None = None) -> tuple[str, ...]:
    """What to say beside any score on the data set of this name.

    start: what the training started from.
    """
    limits = CIFAR10_LIMITS if data in PUBLIC else OWN_LIMITS
    return limits if start is None or start.origin is None else (*limits, IMAGENET_LIMIT)


def evaluate(
    run: Run,
    data: str | Path | Mapping[str, Any] | ImageData | None = None,
    *,
    weights: str = "kept",
    views: str = "single",
) -> Evaluation:
    """Score `run` on the test images of `data`, or of the data it was trained on.

    With `views` other than `single` (see `logits_of`) a picture is answered from several versions
    of it, which is more work and not comparable with a single view: the temperature is that of a
    single one, and is not used.

    Raises:
        DataError: the data cannot be had, or has other classes or another image size.
    """
    images = run.task.load(data)
    run.check_data(images)
    weights = run.kept if weights == "kept" else weights
    model, learnt = run.model(weights), None
    if views == "single":
        logits, features = answers_of(model, images.x_test)
        learnt = held_out.read(run, weights)
    else:
        logits, features = logits_of(model, images.x_test, views=views), None
    doubt, means = (None, None) if learnt is None else learnt
    near = None if means is None or features is None else familiarity(features, means)
    return assess(
        logits,
        images.y_test,
        run=str(run.path),
        weights=weights,
        views=views,
        data=images.name,
        class_names=images.class_names,
        limits=limits_of(images.name, run.task.start),
        files=images.files_test,
        doubt=doubt,
        familiarity=near,
    )
