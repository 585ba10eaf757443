"""What a whole population of images looks like to each batch normalisation.

Running statistics stand in for those of a population, which Ioffe and Szegedy mean (2015, arXiv
1502.03167, algorithm 2). Here they are computed: dropout off, each batch normalised by its own
statistics, and each layer's moments pooled over the batches by the law of total variance,

    μ  = Σ nᵢ·μᵢ / Σ nᵢ
    σ² = Σ nᵢ·(σᵢ² + (μᵢ − μ)²) / Σ nᵢ
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from normlab.data.batches import EVALUATION_BATCH, batch_bounds, to_input
from normlab.errors import UserError
from normlab.layers import BatchNorm, moments

SAMPLE = 4096  # images that stand for the training set where all of them would cost too much

Images = NDArray[np.uint8] | Tensor  # (N, H, W, 3) pixels, or (N, C, *) as the network takes them


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance (C,), float64, of what a normaliser is given; `count` a channel."""

    mean: Tensor
    var: Tensor
    count: int


def normalizers(model: nn.Module) -> dict[str, BatchNorm | TorchBatchNorm]:
    """The batch normalisations of `model`, by name: normlab's and PyTorch's."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm | TorchBatchNorm)
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Lend the model out: statistics, modes and PyTorch's random stream come back as they were."""
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


def population_moments(
    model: nn.Module, images: Images, batch_size: int = EVALUATION_BATCH
) -> dict[str, Moments]:
    """Pooled moments of each normaliser's input on `images`, by the normaliser's name.

    The model is left as it was. A frozen `BatchNorm` goes on normalising by its running statistics.

    Raises:
        UserError: fewer than two images.
    """
    parts: dict[str, list[Moments]] = {}

    def hook_for(name: str) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            mean, var = moments(x if x.dtype == torch.float64 else x.float())
            found = Moments(mean.double(), var.double(), x.numel() // x.shape[1])
            parts.setdefault(name, []).append(found)

        return note

    hooks = [m.register_forward_pre_hook(hook_for(n)) for n, m in normalizers(model).items()]
    try:
        logits_of(model, images, batch_size, own_statistics=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: pool(found) for name, found in parts.items()}


def pool(parts: list[Moments]) -> Moments:
    """Join the moments of batches to those of all their values: the law of total variance."""
    total = sum(p.count for p in parts)
    weights = [p.count / total for p in parts]
    mean = sum((w * p.mean for w, p in zip(weights, parts, strict=True)), torch.zeros(()))
    var = sum(
        (w * (p.var + (p.mean - mean) ** 2) for w, p in zip(weights, parts, strict=True)),
        torch.zeros(()),
    )
    return Moments(mean, var, total)


@torch.no_grad()
def set_statistics(model: nn.Module, found: Mapping[str, Moments]) -> None:
    """Write moments into the running statistics, unbiased where the layer's library keeps them so.

    Frozen layers and layers without running statistics are left alone.
    """
    for name, layer in normalizers(model).items():
        if layer.running_mean is None or layer.running_var is None or name not in found:
            continue
        if isinstance(layer, BatchNorm):
            if layer.frozen:
                continue
            unbiased = layer.convention.unbiased_running_var
        else:
            unbiased = True
        m = found[name]
        layer.running_mean.copy_(m.mean)
        layer.running_var.copy_(m.var * (m.count / max(m.count - 1, 1) if unbiased else 1.0))


@torch.no_grad()
def logits_of(
    model: nn.Module, images: Images, batch_size: int, *, own_statistics: bool = False
) -> Tensor:
    """Logits (N, K) without dropout; each batch normalised by its own or by running statistics.

    The model is left as it was.

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
    with untouched(model):
        model.eval()
        if own_statistics:
            for layer in normalizers(model).values():
                layer.train()
        bounds = batch_bounds(len(images), batch_size, join_single=own_statistics)
        return torch.cat([model(_inputs(images[a:b], device)).cpu() for a, b in bounds])


def _inputs(images: Images, device: torch.device) -> Tensor:
    return images.to(device) if isinstance(images, Tensor) else to_input(images, device)


def evenly(images: NDArray[np.uint8], count: int = SAMPLE) -> NDArray[np.uint8]:
    """At most `count` of the images, the same ones every time, from all over the set."""
    if len(images) <= count:
        return images
    return images[np.linspace(0, len(images) - 1, count).astype(np.int64)]
