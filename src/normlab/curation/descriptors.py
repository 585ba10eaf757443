"""What a picture looks like, as numbers: the answers of the built-in body's layers, pooled.

The body is that of `--from builtin`, trained on CIFAR-10. Its first layers answer to edges and
textures of any pictures; pooling makes the answers the same wherever they stand.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from normlab.training.starting_points import BUILTIN, open_source

SIDE = 32  # pixels: what copies are looked for at
_BATCH = 500


@cache
def _body() -> Any:
    run = open_source(BUILTIN)
    return None if run is None else run.model()


@torch.no_grad()
def describe(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, H, W, 3) → (N, D): each layer's mean and maximum over positions, and 4 × 4 mean colours.

    Brightness and contrast of a picture are evened out first.
    """
    body = _body()
    parts = []
    for a in range(0, len(pixels), _BATCH):
        x = _even(pixels[a : a + _BATCH])
        pooled = [body.whitening(x)]
        for block in body.blocks:
            pooled.append(block(pooled[-1]))
        means = [h.mean((2, 3)) for h in pooled]
        peaks = [h.amax((2, 3)) for h in pooled[1:]]
        colours = adaptive_avg_pool2d(x, 4).flatten(1)
        parts.append(torch.cat([*means, *peaks, colours], 1).numpy())
    return np.concatenate(parts)


def to_side(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, S, S, 3) → (N, 32, 32, 3): means of areas; smaller pictures are enlarged."""
    if pixels.shape[1:3] == (SIDE, SIDE):
        return pixels
    size, parts = (SIDE, SIDE), []
    for a in range(0, len(pixels), _BATCH):
        x = torch.from_numpy(np.array(pixels[a : a + _BATCH])).permute(0, 3, 1, 2).float()
        large = min(x.shape[2:]) >= SIDE
        small = adaptive_avg_pool2d(x, size) if large else interpolate(x, size, mode="bilinear")
        parts.append(small.round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


def _even(pixels: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, 3) → (N, 3, H, W), each picture with CIFAR-10's mean brightness and contrast."""
    x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
    return (x - mean) / (std + 0.05) * 0.22 + 0.47
