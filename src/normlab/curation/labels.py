"""Labels that are likely wrong, by what models say that have not seen the picture.

Confident learning (Northcutt, Jiang and Chuang 2021, arXiv 1911.00068). p(i, j) is the probability
of class j for picture i by a model that was trained without it, and

    t(j)     the mean of p(i, j) over the pictures labelled j: how sure the model is of class j
    C(y, j)  the number of pictures labelled y for which p(i, j) ≥ t(j), each counted once, at the
             j of the largest p among those that are

Scaled to the classes' numbers, the sum off the diagonal of C estimates how many labels are wrong.
That many pictures, and no more than a tenth of all, are suspects: those of the smallest p(i, y).
(Taking only pictures that C itself counts off its diagonal found 60 % of planted wrong labels on
CIFAR-10 in 8 % of the pictures; by p(i, y) a tenth of the pictures had 88 %.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy  # its parts load when they are first used
import torch
from numpy.typing import NDArray

from normlab import recipes
from normlab.core.streams import stream
from normlab.data.images import ImageData
from normlab.evaluation.baselines import fit_logistic
from normlab.evaluation.forward import logits_of
from normlab.recipes import Recipe
from normlab.recipes.pictures import fitted
from normlab.runs import Task
from normlab.training.loop import fit
from normlab.training.preparation import make_plan, new_state

Probabilities = NDArray[np.float64]  # (N, K)
Labels = NDArray[np.int64]

MOST = 0.1  # of all pictures are called suspects
SCALE = 0.1  # of standardised features
MOST_LOOKS = 40  # of a short training at each picture


@dataclass(frozen=True, eq=False)
class Suspects:
    """Pictures whose labels are doubted, the most doubtful first.

    order: (N,) all pictures by `own`.
    count: how many of them, from the first on, are suspects.
    suggested: (N,) the class of picture i that the model believes in most, its label aside.
    own: (N,) p of the picture's label.
    estimate: how many labels are wrong, by the calibrated matrix C.
    accuracy: of the model, on pictures that it has not seen, by the given labels.
    """

    order: Labels
    count: int
    suggested: Labels
    own: NDArray[np.float64]
    estimate: float
    accuracy: float


def doubt(labels: Labels, p: Probabilities) -> Suspects:
    """Confident learning, as the module's docstring has it.

    labels: (N,); p: (N, K), of models that have not seen the picture.
    """
    n, k = p.shape
    rows = np.arange(n)
    counts = np.bincount(labels, minlength=k)
    own = p[rows, labels]
    sure = np.bincount(labels, own, minlength=k) / np.maximum(counts, 1)
    sure[counts == 0] = np.inf
    confident = np.where(p >= sure, p, -1.0)
    held = confident.argmax(1)
    counted = confident.max(1) >= 0
    joint = np.zeros((k, k))
    np.add.at(joint, (labels[counted], held[counted]), 1)
    totals = joint.sum(1, keepdims=True)
    calibrated = np.divide(joint, totals, out=np.zeros_like(joint), where=totals > 0)
    calibrated *= counts[:, None]
    others = p.copy()
    others[rows, labels] = -1
    suggested = others.argmax(1)
    estimate = float(calibrated.sum() - np.trace(calibrated))
    return Suspects(
        order=np.argsort(own, kind="stable"),
        count=int(min(round(estimate), MOST * n)),
        suggested=suggested,
        own=own,
        estimate=estimate,
        accuracy=float((p.argmax(1) == labels).mean()),
    )


def folds_of(labels: Labels, groups: Labels, folds: int) -> Labels:
    """The fold (N,) of each picture: classes in proportion, pictures of one group together."""
    _, first, which = np.unique(groups, return_index=True, return_inverse=True)
    order = stream(0, "check", "folds").permutation(len(first))
    order = order[np.argsort(labels[first[order]], kind="stable")]
    fold = np.empty(len(first), np.int64)
    fold[order] = np.arange(len(first)) % folds
    same: Labels = fold[which]
    return same


def by_regression(
    features: NDArray[np.float32],
    labels: Labels,
    num_classes: int,
    fold: Labels,
    scale: float = SCALE,
) -> Probabilities:
    """Out-of-fold probabilities of a logistic regression on standardised features (N, D).

    scale: of the features; the penalty of the weights is 1/scale² times that of `fit_logistic`.
    """
    x = features.astype(np.float64)
    x -= x.mean(0)
    std = x.std(0)
    x *= scale / np.where(std > 0, std, 1)
    p = np.empty((len(labels), num_classes))
    for k in np.unique(fold):
        seen, held = fold != k, fold == k
        weights = fit_logistic(x[seen], labels[seen], num_classes)
        p[held] = scipy.special.softmax(x[held] @ weights[:-1] + weights[-1], axis=1)
    return p


def by_training(
    pixels: NDArray[np.uint8],
    labels: Labels,
    num_classes: int,
    fold: Labels,
    recipe: Recipe,
) -> Probabilities:
    """Out-of-fold probabilities of networks trained from their seeds on the other folds."""
    recipe = replace(recipe, validation=0.0, patience=None)
    names = tuple(map(str, range(num_classes)))
    device, threads = torch.device("cpu"), torch.get_num_threads()
    p = np.empty((len(labels), num_classes))
    for k in np.unique(fold):
        seen, held = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        seen = seen[stream(0, "check", "order", int(k)).permutation(len(seen))]
        images = ImageData(
            name="check",
            class_names=names,
            x_train=pixels[seen],
            y_train=labels[seen],
            x_test=pixels[held],
            y_test=labels[held],
        )
        task = Task(
            recipe=recipe,
            seed=int(k),
            data="",
            data_sha256="",
            class_names=names,
            image_size=pixels.shape[1],
        )
        state = new_state(task, images, device)
        fit(make_plan(task, images, threads), state, device)
        p[held] = scipy.special.softmax(
            logits_of(state.model, pixels[held], views="flip").double().numpy(), 1
        )
    return p


def for_few(pictures: int, class_names: Sequence[str], image_size: int) -> Recipe:
    """The recipe for own pictures, a third as long: what a check can take. Shorter for very few."""
    recipe = recipes.get("pictures")
    follows = fitted(class_names, image_size, (), from_run=False)
    steps = min(recipe.least_steps // 3, MOST_LOOKS * pictures // recipe.batch_size)
    return recipe.override(**follows, epochs=1, least_steps=steps)


def together(p: Probabilities, q: Probabilities) -> Probabilities:
    """The geometric mean of two models' probabilities, scaled to the sum 1.

    Of planted wrong labels on photographs of cats and dogs a tenth of the pictures held 0.66 by
    regressions, 0.73 by trainings, 0.80 by both; on waste 0.75, 0.80 and 0.81.
    """
    both: Probabilities = np.sqrt(p * q)
    both /= both.sum(1, keepdims=True)
    return both
