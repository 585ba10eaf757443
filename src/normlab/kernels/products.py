"""Dense products of matrices, by whatever is fastest.

PyTorch multiplies float32 matrices with MKL, which on processors not of its maker leaves the 512
bits aside, and takes its time for few rows on any. oneDNN, which PyTorch carries for convolutions,
does neither; but each call of it costs some 10 µs, and for few rows it lays the weights out anew
first, which takes as long as the product. So training multiplies few rows by dense.c.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from normlab.kernels.layouts import plain
from normlab.kernels.library import available, call, enabled

LEAST = 1 << 20  # multiplications of a product that is worth the call
FEW = 64  # rows; for twice as many oneDNN is the faster


def multiplies(a: Tensor, b: Tensor) -> bool:
    """Whether `product` of `a` (N, I) and `b` (O, I) is oneDNN's."""
    return (
        a.dtype is b.dtype is torch.float32
        and a.is_cpu
        and b.is_cpu
        and a.ndim == b.ndim == 2
        and a.shape[1] == b.shape[1]
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


def trains(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `dense` takes `x` (N, I), `weight` (O, I) and `bias` (O,), faster than PyTorch."""
    if multiplies(x, weight):
        return plain(bias)
    return (
        x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.ndim == 2
        and type(x) is Tensor
        and enabled()
        and plain(bias)
        and _pass(x, weight) is not None
    )


def dense(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`product` in training. Its bits depend on how many rows there are: answers should not."""
    name = _pass(x, weight)
    if name is None:
        return product(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    call(name, x, weight, bias, x.shape[0], *weight.shape[::-1], y)
    return y


def dense_gradients(
    x: Tensor, weight: Tensor, g: Tensor, *, x_grad: bool = True, weight_grad: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of `dense` from `g` = dL/dy: of x, of weight (None if not wanted) and of bias."""
    name = _pass(x, weight)
    if name is None:
        dx = product(g, weight.T) if x_grad else None
        return dx, product(g.T, x.T) if weight_grad else None, g.sum(0)
    dx = torch.empty_like(x) if x_grad else None
    dw = torch.empty_like(weight) if weight_grad else None
    db, shape = g.new_empty(weight.shape[0]), (x.shape[0], *weight.shape[::-1])
    call(f"{name}_gradients", x, weight, g.contiguous(), *shape, dx, dw, db)
    return dx, dw, db


def _pass(x: Tensor, weight: Tensor) -> str | None:
    """The compiled pass for such shapes; None where oneDNN or PyTorch are as fast."""
    n, (c_out, c_in) = x.shape[0], weight.shape
    if not n or c_in % 32 or x.shape[1] != c_in or not available():
        return None
    if not x.is_contiguous() or not weight.is_contiguous():
        return None
    if n * c_out * c_in < LEAST:
        return "small_dense"
    return "dense" if n <= FEW and n % 8 == 0 and c_out % 8 == 0 else None
