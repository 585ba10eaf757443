"""Optional compiled passes over memory; without them everything runs on PyTorch alone.

`kernels.c` holds the passes, `dense.c` the products; `winograd*.c`, `pooled.c` and `pixels.c` hold
the convolutions. `setup.py` compiles them when the package is installed, once for each instruction
set. The variant is the one PyTorch chose for itself (`ATEN_CPU_CAPABILITY` changes both). The
threads are PyTorch's own: the library has no OpenMP runtime and binds to the one that PyTorch has
loaded, so there is one pool, and `torch.set_num_threads` holds.

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
from torch.autograd.graph import increment_version

from normlab.kernels.convolutions import (
    OF_TWO,
    Tiles,
    conv3x3,
    conv3x3_gradients,
    conv3x3_max_pool,
    conv_pixels,
    conv_pixels_gradients,
    convolves,
    convolves_pixels,
    max_pool,
    max_pool_gradient,
    whiten,
    whitens,
)
from normlab.kernels.layouts import as_saved, empty, layout, like, plain, shape_of
from normlab.kernels.library import available, call, disabled, has_amx, has_bfloat16
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
    "as_saved",
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
    "flush_denormals",
    "gradient",
    "has_amx",
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
    "plain",
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
    call("normalize", x, mean, var, weight, bias, eps, *shape_of(x), relu, y)
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
    for p, *_ in parameters:
        increment_version(p)  # as PyTorch's own operations do, so that autograd notices


def right(logits: Tensor, labels: Tensor) -> int:
    """How many of `logits` (N, K) are largest at their label (N,), the first of equals counting.

    Both are contiguous, logits float32 and labels int64; see `evaluation.metrics.right`.
    """
    count = torch.empty((), dtype=torch.int64, device="cpu")
    call("right", logits, labels, *logits.shape, count)
    return int(count)


def flush_denormals(on: bool) -> None:
    """Take denormals for zero, or not, in all of PyTorch's threads; without kernels in this one.

    `torch.set_flush_denormal` is about the thread that calls it; others have what it had when they
    began, so that bits would depend on what ran before.
    """
    torch.set_flush_denormal(on)
    if available():
        call("flush", int(on))


def _doubles(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device="cpu")


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
    y = empty((len(chosen), 3, h, w))
    chosen = np.ascontiguousarray(chosen, np.int64)
    arrays: list[NDArray[Any] | None] = [images, chosen, mirrored, shifts]
    addresses = [None if a is None else a.ctypes.data for a in arrays]
    call("read", *addresses, len(chosen), h, w, y)
    return y
