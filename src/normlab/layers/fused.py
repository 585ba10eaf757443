"""Stages of a network that make fewer passes over memory than their layers one by one.

Each function says in its first lines which composition of layers it equals, and falls back to that
composition wherever the faster way does not apply: in evaluation, with another normaliser, with a
hook that wants to see what lies between, on another device or type.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, relu

from normlab import kernels
from normlab.layers.batchnorm import BatchNorm, moments, normalize
from normlab.layers.dropout import Dropout, draws


def relu_dropout_norm(
    z: Tensor, dropout: Dropout | None, norm: nn.Module, rng: np.random.Generator | None = None
) -> Tensor:
    """norm(dropout(relu(z), rng)) for `z` (N, C) or channels-last (N, C, H, W)."""
    shape = kernels.layout(z)
    if shape is None or shape[2] > 1 or not _batch_normalizes(norm) or _hooked(dropout):
        h = relu(z)
        return norm(h if dropout is None else dropout(h, rng))  # type: ignore[no-any-return]
    assert isinstance(norm, BatchNorm)
    norm.check(z)
    source = None if dropout is None else dropout.source(rng)
    y, mean, var = _ReluDropoutBatchNorm.apply(z, norm.weight, norm.bias, norm.eps, dropout, source)
    norm.track(mean, var, z.numel() // z.shape[1])
    return y  # type: ignore[no-any-return]


class _ReluDropoutBatchNorm(torch.autograd.Function):
    """What is kept for the gradient is h alone: it is 0 exactly where ReLU or dropout cut."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        dropout: Dropout | None,
        source: np.random.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if dropout is None or source is None:
            words, threshold, scale = None, 0, 1.0
        else:
            words, threshold, scale = draws(z.numel(), source), dropout.threshold, dropout.scale
        h, mean, var = kernels.relu_dropout_moments(z, words, threshold, scale)
        ctx.save_for_backward(h, weight, mean, var)
        ctx.eps, ctx.scale = eps, scale
        ctx.mark_non_differentiable(mean, var)
        return kernels.normalize(h, mean, var, weight, bias, eps), mean, var

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, mean, var = ctx.saved_tensors
        grads = kernels.gradient(
            h, g, mean, var, weight, ctx.eps, keep_scale=ctx.scale, x_grad=ctx.needs_input_grad[0]
        )
        needed = (d if need else None for d, need in zip(grads, ctx.needs_input_grad, strict=False))
        return (*needed, None, None, None)


def norm_conv(x: Tensor, norm: nn.Module, conv: nn.Conv2d) -> Tensor:
    """conv(norm(x)) for pixels `x` (N, C, H, W), which need no gradient.

    Without padding, γ and β go through the convolution:

        conv(γ·x̂ + β; W) = conv(x̂; γ·W) + Σ W·β

    so that their gradients follow from that of the kernel, and the gradient with respect to the
    image, as costly as the convolution itself, is never computed.
    """
    if (
        x.requires_grad
        or not _batch_normalizes(norm)
        or _hooked(conv)
        or conv.padding != (0, 0)
        or conv.groups != 1
        or conv.bias is None
        or x.dtype != conv.weight.dtype
    ):
        return conv(norm(x))  # type: ignore[no-any-return]
    assert isinstance(norm, BatchNorm)
    norm.check(x)
    mean, var = moments(x) if kernels.layout(x) is None else kernels.moments(x)
    apply = normalize if kernels.layout(x) is None else kernels.normalize
    x_hat = apply(x, mean, var, None, None, norm.eps)
    norm.track(mean, var, x.numel() // x.shape[1])
    weight, bias = conv.weight, conv.bias  # (O, C, h, w), (O,)
    if norm.bias is not None:
        bias = bias + torch.einsum("oihw,i->o", weight, norm.bias)
    if norm.weight is not None:
        weight = weight * norm.weight.view(1, -1, 1, 1)
    return conv2d(x_hat, weight, bias, conv.stride, dilation=conv.dilation)


class MaxPool2d(nn.MaxPool2d):
    """Maxima of windows; 2 × 2 ones of channels-last images remember them in a byte each."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌊H/2⌋, ⌊W/2⌋) for 2 × 2 windows."""
        shape = kernels.layout(x) if x.ndim == 4 and min(x.shape[2:]) > 1 else None
        plain = (self.kernel_size, self.stride, self.padding, self.dilation) == (2, 2, 0, 1)
        if shape is None or shape[2] > 1 or not plain or self.ceil_mode or self.return_indices:
            return super().forward(x)  # type: ignore[no-any-return]
        return _MaxPool.apply(x)  # type: ignore[no-any-return]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, which = kernels.max_pool(x)
        ctx.save_for_backward(which)
        ctx.x_shape = x.shape
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return kernels.max_pool_gradient(g, ctx.saved_tensors[0], ctx.x_shape)


def _batch_normalizes(norm: nn.Module) -> bool:
    """Whether `norm` is a BatchNorm that would now use the batch's own statistics, unobserved."""
    return type(norm) is BatchNorm and norm.training and not norm.frozen and not _hooked(norm)


def _hooked(module: nn.Module | None) -> bool:
    return module is not None and any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )
