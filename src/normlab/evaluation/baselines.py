"""What simple answers score on the same data: a network is worth what it adds to them."""

from typing import Any

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import NDArray
from PIL import Image

from normlab.data import ImageData
from normlab.evaluation import metrics
from normlab.statistics import accuracy_interval

SIDE = 8  # pixels: what the logistic regression sees of a picture
MAX_ITERATIONS = 200
NEARLY_ALL = 0.98  # from this accuracy on there is little that a network could add


def score_baselines(images: ImageData) -> dict[str, dict[str, Any]]:
    """Scores on the test images of the majority class and of a logistic regression.

    The majority class is that of the training images. The regression sees pictures of 8 × 8
    pixels, standardised, and is trained on all training images.
    """
    y_train, y_test = images.y_train.astype(np.int64), images.y_test.astype(np.int64)
    k = images.num_classes
    majority = int(np.bincount(y_train, minlength=k).argmax())
    x_train, x_test = _features(images.x_train), _features(images.x_test)
    mean, std = x_train.mean(0), x_train.std(0)
    std[std == 0] = 1
    weights = fit_logistic((x_train - mean) / std, y_train, k)
    answers = _with_constant((x_test - mean) / std) @ weights
    return {
        "majority class": _scores(y_test, np.full_like(y_test, majority), k),
        "logistic regression": _scores(y_test, answers.argmax(1), k),
    }


def fit_logistic(
    x: NDArray[np.float64], labels: NDArray[np.int64], num_classes: int
) -> NDArray[np.float64]:
    """Weights (D + 1, K) of multinomial logistic regression, the last row the intercepts.

    Minimises mean cross-entropy + |W|²/(2N), the intercepts unpenalised, by L-BFGS from zero:
    scikit-learn's `LogisticRegression` with its defaults.

    x: (N, D); labels: (N,).
    """
    inputs, n = _with_constant(x), len(x)
    truth = np.eye(num_classes)[labels]
    shape = inputs.shape[1], num_classes
    penalised = np.ones((shape[0], 1))
    penalised[-1] = 0

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = flat.reshape(shape)
        log_p = scipy.special.log_softmax(inputs @ w, axis=1)
        loss = -(truth * log_p).sum() / n + ((penalised * w) ** 2).sum() / (2 * n)
        gradient = inputs.T @ (np.exp(log_p) - truth) / n + penalised * w / n
        return loss, gradient.ravel()

    start, options = np.zeros(shape).ravel(), {"maxiter": MAX_ITERATIONS}
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    weights: NDArray[np.float64] = found.x.reshape(shape)
    return weights


def _features(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(N, H, W, 3) → (N, 8·8·3), each the mean of an area."""
    small = [Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BOX) for p in pictures]
    return np.stack([np.asarray(p) for p in small]).reshape(len(pictures), -1).astype(np.float64)


def _with_constant(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.column_stack([x, np.ones(len(x))])


def _scores(labels: NDArray[np.int64], answers: NDArray[np.int64], k: int) -> dict[str, Any]:
    confusion = metrics.confusion_matrix(labels, answers, k)
    return {
        "test_accuracy": metrics.accuracy(confusion),
        "test_accuracy_interval": list(accuracy_interval(int(confusion.trace()), len(labels))),
        "balanced_accuracy": metrics.balanced_accuracy(confusion),
        "macro_f1": metrics.macro_f1(confusion),
    }
