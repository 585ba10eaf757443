"""Ask a network for its answers and leave no trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from normlab.data.augment import views_of
from normlab.data.batches import EVALUATION_BATCH, batch_bounds, to_input
from normlab.errors import UserError
from normlab.layers import BatchNorm

Images = NDArray[np.uint8] | Tensor  # (N, H, W, 3) pixels, or (N, C, *) as the network takes them


def normalizers(model: nn.Module) -> dict[str, BatchNorm | TorchBatchNorm]:
    """The batch normalisations of `model`, by name: normlab's and PyTorch's."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm | TorchBatchNorm)
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put statistics, modes and PyTorch's random stream back as they were, at the end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, mode in modes:
                module.training = mode


@torch.no_grad()
def logits_of(
    model: nn.Module,
    images: Images,
    batch_size: int = EVALUATION_BATCH,
    *,
    views: str = "single",
    own_statistics: bool = False,
) -> Tensor:
    """Logits (N, K) without dropout, on the CPU.

    Args:
        views: with more than one view of an image (see `views_of`), the mean of their logits.
        own_statistics: normalise each batch by its own statistics instead of the running ones.

    Raises:
        UserError: own statistics of a batch with fewer than two images.
    """
    if own_statistics and min(len(images), batch_size) < 2:
        raise UserError(
            f"{len(images)} image(s) in batches of {batch_size}: "
            "statistics of a batch take two or more"
        )
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    parts = []
    with untouched(model):
        model.eval()
        if own_statistics:
            for layer in normalizers(model).values():
                layer.train()
        for a, b in batch_bounds(len(images), batch_size, join_single=own_statistics):
            seen = [model(x) for x in views_of(_inputs(images[a:b], device), views)]
            parts.append((seen[0] if len(seen) == 1 else torch.stack(seen).mean(0)).cpu())
    return torch.cat(parts)


def _inputs(images: Images, device: torch.device) -> Tensor:
    return images.to(device) if isinstance(images, Tensor) else to_input(images, device)
