"""Stages of a network that make fewer passes over memory than their layers one by one.

Each function says in its first lines which composition of layers it equals, and falls back to that
composition wherever the faster way does not apply: in evaluation, with another normaliser, with a
hook that wants to see what lies between, on another device or type.
"""

from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, relu

from normlab import kernels
from normlab.layers.batchnorm import BatchNorm, needed
from normlab.layers.dropout import Dropout, draws


def relu_dropout_norm(
    z: Tensor, dropout: Dropout | None, norm: nn.Module, rng: np.random.Generator | None = None
) -> Tensor:
    """norm(dropout(relu(z), rng)) for `z` (N, C) or channels-last (N, C, H, W)."""
    if not _batch_normalizes(norm) or _hooked(dropout) or not _is_matrix(z, norm):
        h = relu(z)
        return norm(h if dropout is None else dropout(h, rng))  # type: ignore[no-any-return]
    norm.check(z)
    source = None if dropout is None else dropout.source(rng)
    y: Tensor = _ReluDropoutBatchNorm.apply(  # type: ignore[no-untyped-call]
        z, norm.weight, norm.bias, norm, dropout, source
    )
    return y


class _ReluDropoutBatchNorm(torch.autograd.Function):
    """What is kept for the gradient is h alone: it is 0 exactly where ReLU or dropout cut."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: BatchNorm,
        dropout: Dropout | None,
        source: np.random.Generator | None,
    ) -> Tensor:
        words, threshold, scale = None, 0, 1.0
        if dropout is not None and source is not None:
            words, threshold, scale = draws(z.numel(), source), dropout.threshold, dropout.scale
        running = norm.running(z.numel() // z.shape[1])
        y, h, mean, var = kernels.relu_dropout_batch_norm(
            z, words, threshold, scale, weight, bias, norm.eps, running
        )
        ctx.save_for_backward(h, weight, mean, var)
        ctx.shape, ctx.eps, ctx.scale = kernels.layout(h), norm.eps, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, mean, var = ctx.saved_tensors
        grads = kernels.gradient(h, ctx.shape, g, mean, var, weight, ctx.eps, keep_scale=ctx.scale)
        return needed(ctx, *grads, None, None, None)


def norm_conv(x: Tensor, norm: nn.Module, conv: nn.Conv2d) -> Tensor:
    """conv(norm(x)) for pixels `x` (N, C, H, W), which need no gradient.

    Without padding, γ and β go through the convolution:

        conv(γ·x̂ + β; W) = conv(x̂; γ·W) + Σ W·β

    so that their gradients follow from that of the kernel, and the gradient with respect to the
    image, as costly as the convolution itself, is never computed.
    """
    if (
        not _batch_normalizes(norm)
        or x.requires_grad
        or _hooked(conv)
        or conv.padding != (0, 0)
        or conv.groups != 1
        or conv.bias is None
        or x.dtype != conv.weight.dtype
    ):
        return conv(norm(x))  # type: ignore[no-any-return]
    norm.check(x)
    x_hat = norm.standardize(x)
    weight, bias = conv.weight, conv.bias  # (O, C, h, w), (O,)
    if norm.bias is not None:
        bias = bias + torch.einsum("oihw,i->o", weight, norm.bias)
    if norm.weight is not None:
        weight = weight * norm.weight.view(1, -1, 1, 1)
    y: Tensor = _ConvOfInput.apply(  # type: ignore[no-untyped-call]
        x_hat, weight, bias, conv.stride, conv.dilation
    )
    return y


class _ConvOfInput(torch.autograd.Function):
    """A convolution whose input needs no gradient.

    PyTorch's own gradient of the bias costs as much as that of the kernel; a plain sum does not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.dilation = stride, dilation
        return conv2d(x, weight, bias, stride, dilation=dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, weight_grad, _ = torch.ops.aten.convolution_backward(
            *(g, x, weight, None, ctx.stride, (0, 0), ctx.dilation, False, (0, 0), 1),
            output_mask=(False, True, False),
        )
        return None, weight_grad, g.sum((0, 2, 3)), None, None


class MaxPool2d(nn.MaxPool2d):
    """Maxima of windows; 2 × 2 ones of channels-last images remember them in a byte each."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌊H/2⌋, ⌊W/2⌋) for 2 × 2 windows."""
        shape = kernels.layout(x) if x.ndim == 4 and min(x.shape[2:]) > 1 else None
        plain = (self.kernel_size, self.stride, self.padding, self.dilation) == (2, 2, 0, 1)
        if shape is None or shape[2] > 1 or not plain or self.ceil_mode or self.return_indices:
            return super().forward(x)  # type: ignore[no-any-return]
        y: Tensor = _MaxPool.apply(x)  # type: ignore[no-untyped-call]
        return y


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, which = kernels.max_pool(x)
        ctx.save_for_backward(which)
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return kernels.max_pool_gradient(g, ctx.saved_tensors[0], ctx.x_shape)


def _batch_normalizes(norm: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether `norm` is a BatchNorm that would now use the batch's own statistics, unobserved."""
    return type(norm) is BatchNorm and norm.uses_batch() and not _hooked(norm)


def _is_matrix(x: Tensor, norm: BatchNorm) -> bool:
    shape = kernels.layout(x)
    return shape is not None and shape[2] == 1 and norm.compiled(x)


def _hooked(module: nn.Module | None) -> bool:
    return module is not None and any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )
