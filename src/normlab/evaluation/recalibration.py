"""A run's weights with the statistics of a whole set of images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from normlab.core.tensors import digest, write_tensors
from normlab.data import ImageData
from normlab.data.batches import Split, split_images
from normlab.errors import DataError, UserError
from normlab.evaluation.forward import evaluation_batch, normalizers
from normlab.evaluation.population import evenly, population_moments, set_statistics
from normlab.evaluation.scores import Score, score
from normlab.runs import Run


@dataclass(frozen=True)
class Repair:
    """What a network scores on held-out images before and after its statistics were renewed."""

    before: Score
    after: Score

    def __str__(self) -> str:
        return (
            f"the running statistics were stale: on the held-out images they gave "
            f"{self.before.accuracy:.1%}, those of the training images {self.after.accuracy:.1%}; "
            "the latter are kept"
        )


def renew_stale(model: nn.Module, train: NDArray[np.uint8], held_out: Split) -> Repair | None:
    """Give the network population statistics if its running ones are plainly stale.

    The rule: with population statistics, from at most 4,096 training images, the held-out images
    have a lower loss, and an accuracy that is higher by more than 2 points and by more than two
    standard errors, √(p·(1 − p)/N) each. A training of some hundred steps with a slow momentum
    ends so: after t steps the initial values still weigh mᵗ.

    Returns:
        None if the network was left as it is.
    """
    if not normalizers(model) or len(held_out) < 2 or len(train) < 2:
        return None
    before = score(model, held_out.images, held_out.labels)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    set_statistics(model, population_moments(model, evenly(train)))
    after = score(model, held_out.images, held_out.labels)
    error = math.sqrt(max(before.accuracy * (1 - before.accuracy), 0.0) / len(held_out))
    if after.loss < before.loss and after.accuracy - before.accuracy > max(0.02, 2 * error):
        return Repair(before, after)
    model.load_state_dict(kept)
    return None


def recalibrate(
    run: Run, data: str | Path | Mapping[str, Any] | ImageData | None = None
) -> dict[str, Any]:
    """Write the run's weights with population statistics as its `recalibrated` weights.

    The run's own weights and its result stay; `run.evaluate(weights="recalibrated")` scores them.
    A run whose training renewed its statistics keeps just these weights, so it is refused.

    Args:
        run: a finished run.
        data: whose training images to take, labels unseen: None for those the run was trained on,
            validation images left out; other data adapt the network to new pictures (Li et al.
            2016, arXiv 1603.04779).

    Returns:
        What was done, as the file says too: data, images, batch size, SHA-256 of the weights.

    Raises:
        UserError: an unfinished run, a network without batch normalisation, other image sizes,
            recalibrated weights that are the run's own.
    """
    if isinstance(run, nn.Module):
        raise UserError(
            f"a live {type(run).__name__} is no run: renew its statistics with "
            "torch.optim.swa_utils.update_bn(batches, network)"
        )
    weights = run.kept
    if weights == "recalibrated":
        raise UserError(
            f"the weights that run {run.path} keeps are recalibrated ones: its training renewed "
            "stale statistics, and they would be overwritten"
        )
    model = run.model(weights)
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
        pixels = split_images(images, run.task.recipe.validation)[0].images
    set_statistics(model, population_moments(model, pixels))
    done = {
        "weights": weights,
        "data": images.name,
        "data_sha256": images.sha256,
        "images": len(pixels),
        "batch_size": evaluation_batch(pixels),
        "weights_sha256": digest(model.state_dict()),
    }
    write_tensors(run.path / "recalibrated.safetensors", model.state_dict(), done)
    return done
