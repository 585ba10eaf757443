"""The only way to a score: which weights, on which images, with which statistics.

A batch-normalised network answers differently with the statistics of the batch at hand, with the
running ones, and with those of a whole population of images (`normlab.evaluation.population`).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.core.ranks import ALONE, Ranks
from normlab.data.batches import EVALUATION_BATCH, Split
from normlab.errors import UserError, nearest
from normlab.evaluation.forward import Images, count, logits_of, untouched
from normlab.evaluation.metrics import cross_entropy, right
from normlab.evaluation.population import population_moments, set_statistics

STATISTICS = ("running", "batch", "population")


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats, and accuracy."""

    loss: float
    accuracy: float


def score(
    model: nn.Module,
    images: Images,
    labels: NDArray[np.integer] | Tensor,
    *,
    statistics: str = "running",
    views: str = "single",
    population: Images | None = None,
    batch_size: int = EVALUATION_BATCH,
    ranks: Ranks = ALONE,
) -> Score:
    """Score a network as it is; it stays as it was.

    Args:
        images: (N, H, W, 3) uint8, (N, C, *) ready for the network, or a dictionary of the
            network's keyword arguments.
        labels: (N,), the number of each image's class.
        statistics: `running`, `batch` (each batch of `batch_size` images normalised by its own) or
            `population` (of `population`, pooled).
        views: see `normlab.data.augment.views_of`.
        population: images that population statistics are taken from, without their labels: those
            of the training set, as a rule. None: `images` themselves.
        ranks: processes that score the same together, each image in one of them.

    Raises:
        UserError: unknown statistics, a batch with fewer than two images, labels of another
            number, form or range, or a network that does not answer with one row of logits for
            each image.
    """
    if statistics not in STATISTICS:
        raise UserError(f"unknown statistics {nearest(statistics, STATISTICS)}")
    truth = _truth(labels, count(images))
    with untouched(model):
        if statistics == "population":
            chosen = images if population is None else population
            set_statistics(model, population_moments(model, chosen, ranks=ranks))
        own = statistics == "batch"
        size = batch_size if own else None
        logits = logits_of(model, images, size, views=views, own_statistics=own, ranks=ranks)
    _check(logits, truth)
    return Score(cross_entropy(logits, truth), right(logits, truth).double().mean().item())


def _truth(labels: NDArray[np.integer] | Tensor, total: int) -> Tensor:
    """Labels (N,) as whole numbers."""
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.shape != (total,):
        hint = "; of one-hot rows take .argmax(1)" if values.ndim == 2 else ""
        raise UserError(
            f"labels of shape {values.shape} for {total} images: give one class number an "
            f"image{hint}"
        )
    if values.dtype.kind not in "iub":
        raise UserError(f"labels of type {values.dtype}: give class numbers, whole ones from 0")
    return torch.as_tensor(values.astype(np.int64))


def _check(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits and labels that do not belong to each other."""
    if logits.ndim != 2 or len(logits) != len(labels):
        raise UserError(
            f"the network answers {len(labels)} images with logits of shape "
            f"{tuple(logits.shape)}: scores take (N, K); without labels only statistics are taken"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise UserError(
            f"labels from {low} to {high} for a network of {logits.shape[1]} classes: give class "
            f"numbers from 0 to {logits.shape[1] - 1}"
        )


def clearly_better(model: nn.Module, other: nn.Module, held_out: Split) -> bool:
    """Whether `model` has a lower loss than `other` by more than one standard error.

    Of the paired differences, image by image: on few images the lowest of many losses is luck, and
    weights that have cooled down are worth more than those that had it.
    """
    labels = torch.from_numpy(held_out.labels)
    losses = [
        nn.functional.cross_entropy(
            logits_of(m, held_out.images).double(), labels, reduction="none"
        )
        for m in (model, other)
    ]
    gain = losses[1] - losses[0]
    return len(gain) > 1 and bool(gain.mean() > gain.std() / math.sqrt(len(gain)))


@dataclass(frozen=True)
class ThreeWay:
    """The same weights on the same images with three kinds of statistics.

    Attributes:
        batch: each batch of `batch_size` images normalised by its own statistics.
        running: with the running statistics, as in every evaluation.
        population: with population statistics.
        count: images scored.
    """

    batch: Score
    running: Score
    population: Score
    count: int
    batch_size: int


def three_way(
    model: nn.Module,
    images: Images,
    labels: NDArray[np.integer] | Tensor,
    *,
    population: Images | None = None,
    batch_size: int = 32,
    ranks: Ranks = ALONE,
) -> ThreeWay:
    """Score `images` with batch, running and population statistics; see `score`.

    Raises:
        UserError: a batch with fewer than two images.
    """
    scores = {
        kind: score(
            *(model, images, labels),
            statistics=kind,
            population=population,
            batch_size=batch_size,
            ranks=ranks,
        )
        for kind in STATISTICS
    }
    return ThreeWay(**scores, count=count(images), batch_size=batch_size)
