"""A run's weights with the statistics of a whole set of images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from normlab.core.files import digest, write_tensors
from normlab.data import ImageData
from normlab.data.batches import EVALUATION_BATCH, split_images
from normlab.errors import DataError, UserError
from normlab.evaluation.forward import normalizers
from normlab.evaluation.population import population_moments, set_statistics
from normlab.runs import Run


def recalibrate(
    run: Run, data: str | Path | Mapping[str, Any] | ImageData | None = None
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
        pixels = split_images(images, run.task.recipe.validation)[0].images
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
