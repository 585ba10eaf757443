"""Compiled convolutions and the pooling behind them; `winograd*.c`, `pooled.c`, `pixels.c`."""

from typing import NamedTuple

import torch
from torch import Tensor

from normlab.kernels.layouts import empty, layout, plain
from normlab.kernels.library import call, has_amx, has_bfloat16


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """2 × 2 maxima of `x` (N, C, H, W), channels-last, and which of the four values each is."""
    n, c, h, w = x.shape
    y, which = _windows(n, c, h, w)
    call("pool", x, n, h, w, c, y, which)
    return y, which


def _windows(n: int, c: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Room for 2 × 2 maxima and their places."""
    shape = (n, c, h // 2, w // 2)
    return empty(shape), empty(shape, torch.uint8)


def max_pool_gradient(g: Tensor, which: Tensor, x_shape: torch.Size) -> Tensor:
    """The gradient of `max_pool` with respect to its input of shape `x_shape`."""
    n, c, h, w = x_shape
    which = which.contiguous(memory_format=torch.channels_last)
    dx = empty(x_shape)
    g = g.contiguous(memory_format=torch.channels_last)
    call("pool_gradient", g, which, n, h, w, c, dx)
    return dx


class Tiles(NamedTuple):
    """How a compiled 3 × 3 convolution is computed (Lavin and Gray 2016, arXiv 1509.09308).

    Attributes:
        side: of the tiles of the output that are computed together, 2 or 4: 4/9 or 1/4 of the
            multiplications; with 4 rounding is larger (winograd4.c).
        bfloat16: round the products' factors to bfloat16 where the processor multiplies these
            faster, by AVX512-BF16 or AMX; sums stay float32. Elsewhere nothing is rounded, nor on a
            processor with AMX in layers whose channels are no multiples of 32.
    """

    side: int = 2
    bfloat16: bool = False

    def kernel(self, height: int, width: int, c_in: int, c_out: int) -> str:
        """What computes maps of `height` × `width` from so many channels and to so many."""
        # Tiles of 4 on maps of two pixels would compute more than tiles of 2.
        side = self.side if min(height, width) > 2 else 2
        if not (self.bfloat16 and has_bfloat16()):
            return f"conv3x3_by{side}"
        if not has_amx():
            return f"conv3x3_by{side}_bfloat16"
        # Where there is AMX, AVX512-BF16 is no faster than float32 (docs/benchmarks.md).
        return f"conv3x3_by{side}" + ("_amx" if c_in % 32 == 0 and c_out % 32 == 0 else "")


OF_TWO = Tiles()


def convolves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `conv3x3` takes channels-last `x` (N, I, H, W), `weight` (O, I, 3, 3), `bias` (O,).

    O is a multiple of 16, and I of 8, or of 16 where `x` wants its gradient.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.shape[2:] != (3, 3):
        return False
    shape, (c_out, c_in) = layout(x), weight.shape[:2]
    if shape is None or shape[2] > 1:
        return False
    whole = c_out % 16 == 0 and c_in % (16 if x.requires_grad else 8) == 0
    return x.ndim == 4 and x.shape[1] == c_in and whole and plain(bias)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles = OF_TWO) -> Tensor:
    """3 × 3 convolution of `x` (N, I, H, W), zero-padded by 1, stride 1: (N, O, H, W)."""
    n, _, h, w = x.shape
    y = empty((n, len(weight), h, w))
    _convolve(x, weight, bias, tiles, y, None)
    return y


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles, y: Tensor, which: Tensor | None
) -> None:
    """Write the convolution to `y`, or its maxima, and which they are to `which`."""
    (n, c_in, h, w), c_out = x.shape, len(weight)
    weight = weight.contiguous()
    call(tiles.kernel(h, w, c_in, c_out), x, weight, bias, n, h, w, c_in, c_out, 0, y, which)


def conv3x3_max_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles = OF_TWO
) -> tuple[Tensor, Tensor]:
    """`max_pool` of `conv3x3`, which itself is never written."""
    n, _, h, w = x.shape
    y, which = _windows(n, len(weight), h, w)
    _convolve(x, weight, bias, tiles, y, which)
    return y, which


def conv3x3_gradients(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    which: Tensor | None = None,
    *,
    tiles: Tiles = OF_TWO,
    x_grad: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients with respect to x (None without `x_grad`), kernel and bias, from `g` = dL/dy.

    Args:
        which: what `conv3x3_max_pool` returned, where y are its maxima.
    """
    (n, c_in, h, w), c_out = x.shape, weight.shape[0]
    # Hooks on saved tensors may have laid them otherwise.
    x, g = (v.contiguous(memory_format=torch.channels_last) for v in (x, g))
    which = None if which is None else which.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    weight_grad, bias_grad = torch.empty_like(weight), g.new_empty(c_out)
    dx = empty(x.shape) if x_grad else None
    grads, shape = (weight_grad, bias_grad), (n, h, w, c_in, c_out)
    name = tiles.kernel(h, w, c_in, c_out)
    if which is not None and name == "conv3x3_by2" and c_in % 32 == 0:
        call("conv3x3_pooled_gradients", x, weight, g, which, *shape, dx, *grads)
    else:
        call(f"{name}_gradient", x, g, which, *shape, *grads)
        if x_grad:
            call(name, g, weight, None, *shape, 1, dx, which)
    return dx, *grads


def convolves_pixels(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether `conv_pixels` takes channels-last `x` (N, 3, H, W), `weight` (O, 3, 3, 3) and the
    `others`, vectors."""
    if not plain(*others) or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return False
    shape, c_out = layout(x), len(weight)
    if shape is None or shape[1:] != (3, 1) or x.ndim != 4:
        return False
    return weight.shape[1:] == (3, 3, 3) and c_out % 32 == 0 and x.shape[2] > 2 and x.shape[3] > 7


def conv_pixels(
    x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    """3 × 3 convolution of γ·`x` + β (N, 3, H, W), not padded, stride 1: (N, O, H − 2, W − 2)."""
    (n, _, h, w), c_out = x.shape, len(weight)
    y = empty((n, c_out, h - 2, w - 2))
    call("conv_pixels", x, weight.contiguous(), gamma, beta, bias, n, h, w, c_out, y)
    return y


def conv_pixels_gradients(
    x: Tensor, weight: Tensor, g: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to kernel, bias, γ and β, from `g` = dL/dy."""
    (n, _, h, w), c_out = x.shape, g.shape[1]
    x, g = (v.contiguous(memory_format=torch.channels_last) for v in (x, g))
    weight = weight.contiguous()
    grads = torch.empty_like(weight), g.new_empty(c_out), g.new_empty(3), g.new_empty(3)
    call("conv_pixels_gradient", x, weight, gamma, beta, g, n, h, w, c_out, *grads)
    return grads


def whitens(x: Tensor, filters: Tensor) -> bool:
    """Whether `whiten` takes channels-last `x` (N, 3, H, W) and `filters` (2K, 3, 3, 3)."""
    shape, kinds = layout(x), len(filters) // 2
    if shape is None or shape[1:] != (3, 1) or x.ndim != 4 or kinds > 16:
        return False
    if x.requires_grad or filters.dtype != torch.float32 or filters.device.type != "cpu":
        return False
    return torch.equal(filters[kinds:], -filters[:kinds])


def whiten(x: Tensor, mean: Tensor, filters: Tensor) -> Tensor:
    """ReLU of the convolution of `x` − `mean` (N, 3, H, W), zero-padded by 1: (N, 2K, H, W).

    Args:
        filters: (2K, 3, 3, 3), K ≤ 16 and their negatives.
    """
    n, _, h, w = x.shape
    y = empty((n, len(filters), h, w))
    call("whiten", x, mean, filters.contiguous(), n, h, w, len(filters) // 2, y)
    return y
