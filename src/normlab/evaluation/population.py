"""What a whole population of images looks like to each batch normalisation.

Running statistics stand in for those of a population, which Ioffe and Szegedy mean (2015, arXiv
1502.03167, algorithm 2). Here they are computed: dropout off, each batch normalised by its own
statistics, and each layer's moments pooled over the batches by the law of total variance,

    μ  = Σ nᵢ·μᵢ / Σ nᵢ
    σ² = Σ nᵢ·(σᵢ² + (μᵢ − μ)²) / Σ nᵢ
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.core.ranks import ALONE, Ranks
from normlab.evaluation.forward import (
    Images,
    count,
    evaluation_batch,
    first_tensor,
    frozen,
    normalizers,
    run_batches,
    trains,
)
from normlab.layers import BatchNorm, moments

SAMPLE = 4096  # images that stand for the training set where all of them would cost too much


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance (C,), float64, of what a normaliser is given; `count` a channel."""

    mean: Tensor
    var: Tensor
    count: int


def population_moments(
    model: nn.Module, images: Images, batch_size: int | None = None, ranks: Ranks = ALONE
) -> dict[str, Moments]:
    """Pooled moments of each normaliser's input on `images`, by the normaliser's name.

    With several `ranks`, which have the same model and images, each takes a share of the batches.

    The model is left as it was. Frozen layers go on normalising by their running statistics, and so
    do those that are kept in `.eval()` in a model in training mode.

    Raises:
        UserError: fewer than two images.
    """
    parts: dict[str, list[Moments]] = {}

    def hook_for(name: str) -> Any:
        def note(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = first_tensor([*inputs, *named.values()])
            if x is None or x.ndim < 2 or not x.numel():
                return
            mean, var = moments(x if x.dtype == torch.float64 else x.float())
            found = Moments(mean.double(), var.double(), x.numel() // x.shape[1])
            parts.setdefault(name, []).append(found)

        return note

    hooks = [
        layer.register_forward_pre_hook(hook_for(name), with_kwargs=True)
        for name, layer in normalizers(model).items()
    ]
    size = evaluation_batch(images) if batch_size is None else batch_size
    try:
        run_batches(model, images, size, own_statistics=True, ranks=ranks, take=lambda _, __: None)
    finally:
        for hook in hooks:
            hook.remove()
    if ranks.size > 1:
        return _everyone(model, parts, ranks, -(-count(images) // size))
    return {name: pool(found) for name, found in parts.items()}


def _everyone(
    model: nn.Module, own: Mapping[str, list[Moments]], ranks: Ranks, most: int
) -> dict[str, Moments]:
    """Pool the moments of all ranks' batches, in the batches' order, from one message.

    Args:
        most: batches that there may be.
    """
    layers = normalizers(model)
    rows = {name: torch.zeros(most, 1 + 2 * m.num_features).double() for name, m in layers.items()}
    for name, parts in own.items():
        for i, p in enumerate(parts):
            rows[name][ranks.rank + i * ranks.size] = torch.cat(
                [torch.tensor([float(p.count)], dtype=torch.float64), p.mean.cpu(), p.var.cpu()]
            )
    flat = ranks.sum(torch.cat([r.flatten() for r in rows.values()]))  # zeros are added: bits stay
    found = {}
    places = torch.split(flat, [r.numel() for r in rows.values()])
    for (name, mine), place in zip(rows.items(), places, strict=True):
        everyone = [
            Moments(row[1 : 1 + len(row) // 2], row[1 + len(row) // 2 :], int(row[0]))
            for row in place.view_as(mine)
            if row[0] > 0
        ]
        if everyone:
            found[name] = pool(everyone)
    return found


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

    Left alone are layers without running statistics, frozen ones, and those that are kept in
    `.eval()` in a model in training mode.
    """
    training = trains(model)
    for name, layer in normalizers(model).items():
        if layer.running_mean is None or layer.running_var is None or name not in found:
            continue
        if frozen(layer, training):
            continue
        unbiased = layer.convention.unbiased_running_var if isinstance(layer, BatchNorm) else True
        m = found[name]
        layer.running_mean.copy_(m.mean)
        layer.running_var.copy_(m.var * (m.count / max(m.count - 1, 1) if unbiased else 1.0))


def evenly(images: NDArray[np.uint8], count: int = SAMPLE) -> NDArray[np.uint8]:
    """At most `count` of the images, the same ones every time, from all over the set."""
    if len(images) <= count:
        return images
    return images[np.linspace(0, len(images) - 1, count).astype(np.int64)]
