"""How tensors lie in memory, as far as the compiled passes care."""

from collections.abc import Sequence

import torch
from torch import Tensor

from normlab.kernels.library import available, enabled


def layout(x: Tensor) -> tuple[int, int, int] | None:
    """How `x` (N, C, *) lies, as the kernels' N, C, S; None where PyTorch must do the work.

    Channels-last and dense activations are a matrix with S = 1, whose rows are pixels.
    """
    if (
        type(x) is not Tensor
        or x.dtype is not torch.float32
        or not x.is_cpu
        or not available()
        or not enabled()
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


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for `shape` (N, C, H, W), channels-last, whatever PyTorch's defaults are."""
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def plain(*tensors: Tensor | None) -> bool:
    """Whether all that are not None are float32, in this memory, and without gaps."""
    for v in tensors:  # a loop: on small layers most of the time is Python's
        if v is not None and not (v.dtype is torch.float32 and v.is_cpu and v.is_contiguous()):
            return False
    return True


def as_saved(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """`x` (N, C, *) as it lay when `layout` said `shape`: hooks on saved tensors may copy it."""
    if _arrangement(x) == shape:
        return x
    return x.contiguous() if shape[2] > 1 else x.movedim(1, -1).contiguous().movedim(-1, 1)


def like(g: Tensor, x: Tensor) -> Tensor:
    """`g` itself if it lies in memory as `x` does, else a copy that does."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def shape_of(x: Tensor) -> tuple[int, int, int]:
    """`layout` of an `x` that a kernel takes, also where kernels were disabled since.

    Raises:
        ValueError: no kernel takes it.
    """
    shape = _arrangement(x)
    if shape is None:
        raise ValueError(f"no kernel for {x.dtype} of shape {tuple(x.shape)}, as it lies")
    return shape
