"""Optional compiled passes over memory; without them everything runs on PyTorch alone.

`kernels.c` holds the passes, `winograd*.c` and `pixels.c` the convolutions and what reads pixels;
`setup.py` compiles them when the package is installed, once for each instruction set. The variant
is the one PyTorch chose for itself (`ATEN_CPU_CAPABILITY` changes both). The threads are PyTorch's
own: the library has no OpenMP runtime and binds to the one that PyTorch has loaded, so there is one
pool, and `torch.set_num_threads` holds.

A function here takes tensors for which `layout` is not None; callers ask that first and keep their
formula in PyTorch beside it.
"""

from collections.abc import Sequence
from struct import pack
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normlab.kernels.library import available, call, disabled, has_bfloat16
from normlab.kernels.products import dense, dense_gradients, multiplies, product, trains

__all__ = [
    "NONE_DROPPED",
    "OF_TWO",
    "RELU_AFTER",
    "RELU_BEFORE",
    "Drops",
    "Running",
    "Tiles",
    "adam",
    "adapts",
    "available",
    "batch_norm",
    "conv3x3",
    "conv3x3_gradients",
    "conv3x3_max_pool",
    "conv_pixels",
    "conv_pixels_gradients",
    "convolves",
    "convolves_pixels",
    "dense",
    "dense_gradients",
    "disabled",
    "gradient",
    "has_bfloat16",
    "layout",
    "like",
    "max_pool",
    "max_pool_gradient",
    "moments",
    "multiplies",
    "normalize",
    "part_gradient",
    "part_sums",
    "product",
    "read",
    "reads",
    "relu_dropout",
    "relu_dropout_batch_norm",
    "relu_dropout_gradient",
    "relu_dropout_moments",
    "right",
    "trains",
    "whiten",
    "whitens",
]


def layout(x: Tensor) -> tuple[int, int, int] | None:
    """How `x` (N, C, *) lies, as the kernels' N, C, S; None where PyTorch must do the work.

    Channels-last and dense activations are a matrix with S = 1, whose rows are pixels.
    """
    if (
        type(x) is not Tensor
        or x.dtype is not torch.float32
        or not x.is_cpu
        or not available()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
        or torch.compiler.is_compiling()
    ):
        return None
    return _arrangement(x)


def _arrangement(x: Tensor) -> tuple[int, int, int] | None:
    size, channels = x.numel(), x.shape[1]
    if not size:
        return None
    if x.ndim == 2:
        return (size // channels, channels, 1) if x.is_contiguous() else None
    pixels = size // (x.shape[0] * channels)
    if pixels == 1 and x.is_contiguous():
        return size // channels, channels, 1
    if x.ndim == 4:  # asked faster than by a view
        last = x.is_contiguous(memory_format=torch.channels_last)
    else:
        last = x.movedim(1, -1).is_contiguous()
    if last:
        return size // channels, channels, 1
    return (x.shape[0], channels, pixels) if x.is_contiguous() else None


def like(g: Tensor, x: Tensor) -> Tensor:
    """`g` itself if it lies in memory as `x` does, else a copy that does."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


class Running(NamedTuple):
    """Running statistics (C,) and how a batch moves them: running ← keep·running + …"""

    mean: Tensor
    var: Tensor
    keep: float
    correction: float  # what the biased variance is multiplied by
    batches: Tensor  # int64, how many have moved them


NO_RUNNING = (None, None, 0.0, 1.0, None)


class Drops(NamedTuple):
    """What dropout does to the values of a batch, or of a part of one, in memory order.

    Value i is dropped where its draw is below `threshold`, the others are multiplied by `scale`.
    Its draw is number `first` + i of those that belong to `key`; see `layers.dropout.draws`.
    """

    key: int = 0  # below 2⁶³, as PyTorch's profiler notes what it is given as int64
    first: int = 0
    threshold: int = 0  # none is below: nothing is drawn, and nothing done
    scale: float = 1.0


NONE_DROPPED = Drops()

NO_RELU, RELU_AFTER, RELU_BEFORE = range(3)  # where `normalize` takes it


def batch_norm(
    x: Tensor,
    shape: tuple[int, int, int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running | None,
    *,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = γ·(x − μ)/√(σ² + ε) + β, μ and σ², and the running statistics moved.

    Args:
        shape: what `layout` says of x.
        relu: return max(y, 0) in place of y; `x` is of matrix layout.
    """
    y, mean, var = torch.empty_like(x), x.new_empty(shape[1]), x.new_empty(shape[1])
    source = (x, None, *NONE_DROPPED)  # without z: x is read as it is
    call(
        "forward",
        *(*source, weight, bias, eps, *shape, +relu, *(running or NO_RUNNING), mean, var, y),
    )
    return y, mean, var


def relu_dropout_batch_norm(
    z: Tensor,
    shape: tuple[int, int, int],
    drops: Drops,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h as `relu_dropout` makes it of `z`, then `batch_norm` of h.

    Args:
        shape: what `layout` says of z.

    Returns:
        y, h, and the mean and variance (C,) of h.
    """
    h, y = torch.empty_like(z), torch.empty_like(z)
    mean, var = z.new_empty(shape[1]), z.new_empty(shape[1])
    call(
        "forward",
        *(h, z, *drops, weight, bias, eps, *shape, 0, *(running or NO_RUNNING), mean, var, y),
    )
    return y, h, mean, var


def relu_dropout(z: Tensor, drops: Drops) -> Tensor:
    """max(z, 0), multiplied by `drops.scale` or 0, for `z` of matrix layout."""
    h = torch.empty_like(z)
    call("relu_dropout", z, *drops, z.numel(), h)
    return h


def relu_dropout_gradient(h: Tensor, g: Tensor, scale: float) -> Tensor:
    """The gradient of `relu_dropout`, whose output is `h`, with respect to its z."""
    dz = torch.empty_like(h)
    call("relu_dropout_gradient", h, like(g, h), scale, h.numel(), dz)
    return dz


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    relu: int = NO_RELU,
) -> Tensor:
    """γ·(x − μ)/√(σ² + ε) + β, with ReLU after or before it; `relu` wants `x` of matrix layout."""
    y = torch.empty_like(x)
    call("normalize", x, mean, var, weight, bias, eps, *_shape(x), relu, y)
    return y


def gradient(
    x: Tensor,
    shape: tuple[int, int, int],
    g: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    keep_scale: float = 0.0,
    bias: Tensor | None = None,
    relu: bool = False,
    x_grad: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients with respect to x, γ and β, from `g` = dL/dy.

    With `keep_scale`, `x` is the h that `relu_dropout_batch_norm` returned, and the first gradient
    is the one with respect to its z. With `relu`, y is what `batch_norm` returned with it, from the
    same `bias`. Without `x_grad` the first is None.

    Args:
        shape: what `layout` says of x.
    """
    g = like(g, x)
    dx = torch.empty_like(x) if x_grad else None
    grads = dx, torch.empty_like(mean), torch.empty_like(mean)
    call("gradient", x, g, mean, var, weight, bias, eps, +relu, keep_scale, *shape, *grads)
    return grads


def moments(x: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel of `x`, (C,) float64."""
    mean, m2 = _doubles(shape[1]), _doubles(shape[1])
    call("moments", x, None, *NONE_DROPPED, *shape, mean, m2)
    return mean, m2


def relu_dropout_moments(
    z: Tensor, shape: tuple[int, int, int], drops: Drops
) -> tuple[Tensor, Tensor, Tensor]:
    """h as `relu_dropout` makes it, and the `moments` of it."""
    h, mean, m2 = torch.empty_like(z), _doubles(shape[1]), _doubles(shape[1])
    call("moments", h, z, *drops, *shape, mean, m2)
    return h, mean, m2


def part_sums(
    x: Tensor,
    shape: tuple[int, int, int],
    g: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    bias: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ g and Σ g·(x − μ) of a part of a batch, (2C,) float64, and its gradients of γ and β.

    μ and σ² are those of the whole batch. The arguments are those of `gradient`; `g` lies as `x`.
    """
    sums, grads = _doubles(2 * shape[1]), (torch.empty_like(mean), torch.empty_like(mean))
    call("part_sums", x, g, mean, var, weight, bias, eps, +relu, *shape, sums, *grads)
    return sums, *grads


def part_gradient(
    x: Tensor,
    shape: tuple[int, int, int],
    g: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    sums: Tensor,
    count: int,
    *,
    keep_scale: float = 0.0,
    bias: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The gradient with respect to x, a part of a batch of `count` values a channel.

    Args:
        sums: of all its parts, as `part_sums` returns them.
    """
    dx = torch.empty_like(x)
    values = (x, g, mean, var, weight, bias, eps, +relu, keep_scale, *shape, sums, float(count))
    call("part_gradient", *values, dx)
    return dx


def adapts(p: Tensor, *others: Tensor) -> bool:
    """Whether `adam` takes a parameter, its gradient and its moments: all lie in memory alike."""
    if p.dtype is not torch.float32 or not p.is_cpu or not available():
        return False
    strides = p.stride()
    for v in others:  # a loop: on small layers most of the time is Python's
        if v.dtype is not torch.float32 or v.stride() != strides:
            return False
    return p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))


def adam(
    parameters: Sequence[tuple[Tensor, ...]],
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """A step of Adam, in place; see `training.optimisers.Adam` for the formula.

    Args:
        parameters: p, g, m, v, and the steps done before, a float32 of its own, which grows by 1.
    """
    numbers: list[int] = []
    for p, g, m, v, steps in parameters:
        moments = m.data_ptr(), v.data_ptr()
        numbers += p.data_ptr(), g.data_ptr(), *moments, steps.data_ptr(), p.numel()
    call("adam", pack(f"@{len(numbers)}q", *numbers), len(parameters), *betas, rate, eps)


def right(logits: Tensor, labels: Tensor) -> int:
    """How many of `logits` (N, K) are largest at their label (N,), the first of equals counting.

    Both are contiguous, logits float32 and labels int64; see `evaluation.metrics.right`.
    """
    count = torch.empty((), dtype=torch.int64)
    call("right", logits, labels, *logits.shape, count)
    return int(count)


def _doubles(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64)


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """2 × 2 maxima of `x` (N, C, H, W), channels-last, and which of the four values each is."""
    n, c, h, w = x.shape
    y, which = _windows(n, c, h, w)
    call("pool", x, n, h, w, c, y, which)
    return y, which


def _windows(n: int, c: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Room for 2 × 2 maxima and their places."""
    shape = (n, c, h // 2, w // 2)
    y = torch.empty(shape, memory_format=torch.channels_last)
    return y, torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)


def max_pool_gradient(g: Tensor, which: Tensor, x_shape: torch.Size) -> Tensor:
    """The gradient of `max_pool` with respect to its input of shape `x_shape`."""
    n, c, h, w = x_shape
    dx = torch.empty(x_shape, memory_format=torch.channels_last)
    g = g.contiguous(memory_format=torch.channels_last)
    call("pool_gradient", g, which, n, h, w, c, dx)
    return dx


class Tiles(NamedTuple):
    """How a compiled 3 × 3 convolution is computed (Lavin and Gray 2016, arXiv 1509.09308).

    Attributes:
        side: of the tiles of the output that are computed together, 2 or 4: 4/9 or 1/4 of the
            multiplications; with 4 rounding is larger (winograd4.c).
        bfloat16: round the products' factors to bfloat16 where the processor has instructions for
            it, twice as many a second; sums stay float32. Elsewhere nothing is rounded.
    """

    side: int = 2
    bfloat16: bool = False

    def kernel(self, height: int, width: int) -> str:
        """What computes maps of `height` × `width`."""
        # Tiles of 4 on maps of two pixels would compute more than tiles of 2.
        side = self.side if min(height, width) > 2 else 2
        return f"conv3x3_by{side}" + ("_bfloat16" if self.bfloat16 and has_bfloat16() else "")


OF_TWO = Tiles()


def convolves(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3` takes channels-last `x` (N, I, H, W) and `weight` (O, I, 3, 3).

    O is a multiple of 16, and I of 8, or of 16 where `x` wants its gradient.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.shape[2:] != (3, 3):
        return False
    shape, (c_out, c_in) = layout(x), weight.shape[:2]
    if shape is None or shape[2] > 1:
        return False
    whole = c_out % 16 == 0 and c_in % (16 if x.requires_grad else 8) == 0
    return x.ndim == 4 and x.shape[1] == c_in and whole


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles = OF_TWO) -> Tensor:
    """3 × 3 convolution of `x` (N, I, H, W), zero-padded by 1, stride 1: (N, O, H, W)."""
    n, _, h, w = x.shape
    y = torch.empty((n, len(weight), h, w), memory_format=torch.channels_last)
    _convolve(x, weight, bias, tiles, y, None)
    return y


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles, y: Tensor, which: Tensor | None
) -> None:
    """Write the convolution to `y`, or its maxima, and which they are to `which`."""
    (n, c_in, h, w), c_out = x.shape, len(weight)
    weight = weight.contiguous()
    call(tiles.kernel(h, w), x, weight, bias, n, h, w, c_in, c_out, 0, y, which)


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
    g = g.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    weight_grad, bias_grad = torch.empty_like(weight), g.new_empty(c_out)
    dx = torch.empty(x.shape, memory_format=torch.channels_last) if x_grad else None
    grads, shape, name = (weight_grad, bias_grad), (n, h, w, c_in, c_out), tiles.kernel(h, w)
    if which is not None and name == "conv3x3_by2" and c_in % 32 == 0:
        call("conv3x3_pooled_gradients", x, weight, g, which, *shape, dx, *grads)
    else:
        call(f"{name}_gradient", x, g, which, *shape, *grads)
        if x_grad:
            call(name, g, weight, None, *shape, 1, dx, which)
    return dx, *grads


def convolves_pixels(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv_pixels` takes channels-last `x` (N, 3, H, W) and `weight` (O, 3, 3, 3)."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
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
    y = torch.empty((n, c_out, h - 2, w - 2), memory_format=torch.channels_last)
    call("conv_pixels", x, weight.contiguous(), gamma, beta, bias, n, h, w, c_out, y)
    return y


def conv_pixels_gradients(
    x: Tensor, weight: Tensor, g: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to kernel, bias, γ and β, from `g` = dL/dy."""
    (n, _, h, w), c_out = x.shape, g.shape[1]
    weight, g = weight.contiguous(), g.contiguous(memory_format=torch.channels_last)
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
    y = torch.empty((n, len(filters), h, w), memory_format=torch.channels_last)
    call("whiten", x, mean, filters.contiguous(), n, h, w, len(filters) // 2, y)
    return y


def reads(images: NDArray[np.uint8], device: torch.device | str, reach: int = 0) -> bool:
    """Whether `read` takes `images` (N, H, W, 3) and shifts of up to `reach`, for `device`."""
    if str(device) != "cpu" or not available():
        return False
    whole = images.dtype == np.uint8 and images.ndim == 4 and images.flags.c_contiguous
    return whole and images.shape[3] == 3 and reach < min(images.shape[1:3])


def read(
    images: NDArray[np.uint8],
    chosen: NDArray[np.int64],
    mirrored: NDArray[np.bool_] | None = None,
    shifts: NDArray[np.int64] | None = None,
) -> Tensor:
    """The `chosen` (B,) of `images` (N, H, W, 3), divided by 255: (B, 3, H, W), channels-last.

    Args:
        mirrored: (N,), which images are mirrored.
        shifts: (N, 2) pixels, less than H and W, by which they are then moved down and right; what
            comes in at the edge is the image reflected there.
    """
    _, h, w, _ = images.shape
    y = torch.empty((len(chosen), 3, h, w), memory_format=torch.channels_last)
    arrays: list[NDArray[Any] | None] = [images, np.ascontiguousarray(chosen), mirrored, shifts]
    addresses = [None if a is None else a.ctypes.data for a in arrays]
    call("read", *addresses, len(chosen), h, w, y)
    return y


def _shape(x: Tensor) -> tuple[int, int, int]:
    shape = _arrangement(x)  # also where disabled since: a backward pass ends as it began
    if shape is None:
        raise ValueError(f"no kernel for {x.dtype} of shape {tuple(x.shape)}, as it lies")
    return shape
