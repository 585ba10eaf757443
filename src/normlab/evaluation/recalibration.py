"""The three scores that a batch-normalised network has, and its statistics set right.

A network answers differently with the statistics of the batch at hand, with the running ones, and
with those of a whole population of images (`normlab.evaluation.population`). This tells when they
disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normlab.core.files import digest, write_tensors
from normlab.data import ImageData
from normlab.data.batches import EVALUATION_BATCH, split_validation
from normlab.errors import DataError, UserError
from normlab.evaluation.population import (
    Images,
    count,
    evenly,
    logits_of,
    normalizers,
    population_moments,
    set_statistics,
    untouched,
)
from normlab.runs.run import Run
from normlab.training.loop import Plan, State


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats, and accuracy."""

    loss: float
    accuracy: float


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
) -> ThreeWay:
    """Score `images` with batch, running and population statistics; the model stays as it was.

    Args:
        images: (N, H, W, 3) uint8, (N, C, *) ready for the network, or a dictionary of the
            network's keyword arguments.
        labels: (N,), the number of each image's class.
        population: images that the population statistics are taken from, without their labels:
            those of the training set, as a rule. None: `images` themselves.
        batch_size: images a batch where batches are normalised by their own statistics.

    Raises:
        UserError: a batch with fewer than two images, labels of another number, form or range,
            or a network that does not answer with one row of logits for each image.
    """
    truth = _truth(labels, count(images))
    found = population_moments(model, images if population is None else population)
    with untouched(model), torch.no_grad():
        batch = _score(logits_of(model, images, batch_size, own_statistics=True), truth)
        running = _score(logits_of(model, images, EVALUATION_BATCH), truth)
        set_statistics(model, found)
        pooled = _score(logits_of(model, images, EVALUATION_BATCH), truth)
    return ThreeWay(batch, running, pooled, len(truth), batch_size)


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


def _score(logits: Tensor, labels: Tensor) -> Score:
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
    loss = cross_entropy(logits.double(), labels).item()
    return Score(loss, (logits.argmax(1) == labels).double().mean().item())


class ThreeWayScores:
    """Adds to each epoch what the validation images score with the other kinds of statistics.

    `val_loss` and `val_accuracy` are the running statistics' already. Population statistics come
    from at most 4,096 of the training images. To be told before whoever writes the history down.
    """

    def before_training(self, plan: Plan) -> None:
        if not len(plan.validation):
            raise UserError("--three-way needs validation images: use --validation above 0")
        self.plan = plan
        self.population = evenly(plan.train.images)

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if batch < batches:
            return
        held_out = self.plan.validation
        scores = three_way(
            state.model,
            held_out.images,
            held_out.labels,
            population=self.population,
            batch_size=self.plan.recipe.batch_size,
        )
        state.history[-1] |= {
            "val_loss_batch": scores.batch.loss,
            "val_accuracy_batch": scores.batch.accuracy,
            "val_loss_population": scores.population.loss,
            "val_accuracy_population": scores.population.accuracy,
        }


def recalibrate(
    run: Run, data: "str | Path | Mapping[str, Any] | ImageData | None" = None
) -> dict[str, Any]:
    """Write the run's last weights with population statistics as its `recalibrated` weights.

    The run's own weights and its result stay; `run.evaluate(weights="recalibrated")` scores them.

    Args:
        run: a finished run.
        data: whose training images to take, labels unseen: None for those the run was trained on,
            validation images left out; other data adapt the network to new pictures (Li et al.
            2016, arXiv 1603.04779).

    Returns:
        What was done, as the file says too: data, images, batch size, SHA-256 of the weights.

    Raises:
        UserError: an unfinished run, a network without batch normalisation, other image sizes.
    """
    if isinstance(run, nn.Module):
        raise UserError(
            f"a live {type(run).__name__} is no run: renew its statistics with "
            "torch.optim.swa_utils.update_bn(batches, network)"
        )
    model = run.model("last")
    if not normalizers(model):
        raise UserError(f"run {run.path} has no batch normalisation: nothing to recalibrate")
    images = run.task.load(data)
    size = images.x_train.shape[1:3]
    if size != (run.task.image_size, run.task.image_size):
        raise DataError(
            f"data {images.name!r} has images of {size[0]} × {size[1]} pixels, run {run.path} "
            f"takes {run.task.image_size} × {run.task.image_size}: resize them"
        )
    pixels = images.x_train
    if images.sha256 == run.task.data_sha256:
        train, _ = split_validation(pixels, images.y_train, run.task.recipe.validation)
        pixels = train.images
    set_statistics(model, population_moments(model, pixels))
    done = {
        "weights": "last",
        "data": images.name,
        "data_sha256": images.sha256,
        "images": len(pixels),
        "batch_size": EVALUATION_BATCH,
        "weights_sha256": digest(model.state_dict()),
    }
    write_tensors(run.path / "recalibrated.safetensors", model.state_dict(), done)
    return done
