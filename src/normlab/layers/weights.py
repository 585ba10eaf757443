"""Convolution and dense layers that start as Keras starts them."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from numpy.random import Generator


def glorot_uniform_(weight: torch.Tensor, rng: "Generator") -> None:
    """Fill `weight` (out, in, *kernel) from U(−a, a), a = √(6/(fan_in + fan_out)).

    Glorot and Bengio (2010), equation 16; a convolution's fans count its kernel's positions.
    """
    positions = math.prod(weight.shape[2:])
    fan_out, fan_in = weight.shape[0] * positions, weight.shape[1] * positions
    limit = math.sqrt(6 / (fan_in + fan_out))
    values = rng.uniform(-limit, limit, size=tuple(weight.shape))
    with torch.no_grad():
        weight.copy_(torch.from_numpy(values))


class Conv2d(nn.Conv2d):
    """3×3 convolution with Glorot-uniform kernel and zero bias."""

    def __init__(self, c_in: int, c_out: int, *, padding: int, rng: "Generator") -> None:
        super().__init__(c_in, c_out, kernel_size=3, padding=padding)
        glorot_uniform_(self.weight, rng)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]


class Dense(nn.Linear):
    """Dense layer with Glorot-uniform kernel and zero bias."""

    def __init__(self, c_in: int, c_out: int, *, rng: "Generator") -> None:
        super().__init__(c_in, c_out)
        glorot_uniform_(self.weight, rng)
        nn.init.zeros_(self.bias)


class Flatten(nn.Module):
    """(N, C, H, W) → (N, H·W·C): the order in which Keras lays pixels and channels out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)
