"""Convolution and dense layers that start as Keras starts them."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d

from normlab import kernels
from normlab.layers.batchnorm import needed

if TYPE_CHECKING:
    from numpy.random import Generator


def glorot_uniform_(weight: Tensor, rng: "Generator") -> None:
    """Fill `weight` (out, in, *kernel) from U(−a, a), a = √(6/(fan_in + fan_out)).

    Glorot and Bengio (2010), equation 16; a convolution's fans count its kernel's positions.
    """
    if weight.is_meta:  # its network is only measured
        return
    positions = math.prod(weight.shape[2:])
    fan_out, fan_in = weight.shape[0] * positions, weight.shape[1] * positions
    limit = math.sqrt(6 / (fan_in + fan_out))
    values = rng.uniform(-limit, limit, size=tuple(weight.shape))
    with torch.no_grad():
        weight.copy_(torch.from_numpy(values))


class Conv2d(nn.Conv2d):
    """3×3 convolution with Glorot-uniform kernel and zero bias.

    Attributes:
        tiles: how the compiled convolution is computed in training.
    """

    tiles = kernels.Tiles()

    def __init__(
        self, c_in: int, c_out: int, *, padding: int, rng: "Generator", bias: bool = True
    ) -> None:
        super().__init__(c_in, c_out, kernel_size=3, padding=padding, bias=bias)
        glorot_uniform_(self.weight, rng)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) → (N, O, H, W), or two pixels less a side without padding."""
        if self.padding != (1, 1):
            return super().forward(x)
        return conv3x3(x, self.weight, self.bias, self.tiles_now())

    def tiles_now(self) -> kernels.Tiles:
        """`tiles`; but where nothing is learnt, answers are not rounded to bfloat16."""
        return self.tiles if self.training else self.tiles._replace(bfloat16=False)


def use_tiles(network: nn.Module, tiles: kernels.Tiles) -> None:
    """Let every `Conv2d` of `network` compute as `tiles` says in training."""
    for layer in network.modules():
        if isinstance(layer, Conv2d):
            layer.tiles = tiles


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: kernels.Tiles = kernels.OF_TWO
) -> Tensor:
    """conv2d(x, weight, bias, padding=1) for 3 × 3 kernels, compiled where that applies."""
    if not kernels.convolves(x, weight, bias):
        return conv2d(x, weight, bias, padding=1)
    if not torch.is_grad_enabled():  # an autograd function costs time even where there is none
        return kernels.conv3x3(x, weight, bias, tiles)
    y: Tensor = _Conv3x3.apply(x, weight, bias, tiles)  # type: ignore[no-untyped-call]
    return y


class _Conv3x3(torch.autograd.Function):
    """The compiled convolution: the same sums in fewer multiplications (winograd.h)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tiles: kernels.Tiles
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tiles = tiles
        return kernels.conv3x3(x, weight, bias, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_grad = ctx.needs_input_grad[0]
        grads = kernels.conv3x3_gradients(x, weight, g, tiles=ctx.tiles, x_grad=x_grad)
        return needed(ctx, *grads, None)


class Dense(nn.Linear):
    """Dense layer with Glorot-uniform kernel and zero bias."""

    def __init__(self, c_in: int, c_out: int, *, rng: "Generator") -> None:
        super().__init__(c_in, c_out)
        glorot_uniform_(self.weight, rng)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I) → (N, O)."""
        if not torch.is_grad_enabled():
            return kernels.product(x, self.weight, self.bias)
        if not kernels.trains(x, self.weight, self.bias):
            return super().forward(x)
        y: Tensor = _Dense.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return kernels.dense(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_needed, weight_needed, _ = ctx.needs_input_grad
        grads = kernels.dense_gradients(x, weight, g, x_grad=x_needed, weight_grad=weight_needed)
        return needed(ctx, *grads)


class Flatten(nn.Module):
    """(N, C, H, W) → (N, H·W·C): the order in which Keras lays pixels and channels out."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)
