"""Dense products of matrices, by whichever of PyTorch's two libraries is the faster.

PyTorch multiplies float32 matrices with MKL, which on processors not of its maker leaves the 512
bits aside, and takes its time for few rows on any. oneDNN, which PyTorch carries for convolutions,
does neither; but each call of it costs some 10 µs.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from normlab.kernels.library import enabled

LEAST = 1 << 20  # multiplications of a product that is worth the call


def multiplies(a: Tensor, b: Tensor) -> bool:
    """Whether `product` of `a` (N, I) and `b` (O, I) is oneDNN's."""
    return (
        a.dtype is b.dtype is torch.float32
        and a.is_cpu
        and b.is_cpu
        and a.ndim == b.ndim == 2
        and len(a) * b.numel() >= LEAST
        and type(a) is Tensor
        and enabled()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call, unused-ignore]
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a·bᵀ + bias of `a` (N, I), `b` (O, I) and `bias` (O,): (N, O). It has no gradient."""
    if multiplies(a, b):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
        return y
    return linear(a, b, bias)
