"""Stages of a network that make fewer passes over memory than their layers one by one.

Each function says in its first lines which composition of layers it equals, and falls back to that
composition wherever the faster way does not apply: in evaluation, with another normaliser, with a
subclass of a layer, whose `forward` may do more, with a hook that wants to see what lies between,
on another device or type.
"""

from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, relu
from torch.nn.modules.module import _has_any_global_hook

from normlab import kernels
from normlab.layers.batchnorm import HALF, BatchNorm, needed, part_gradient
from normlab.layers.dropout import Dropout
from normlab.layers.weights import Conv2d

M = TypeVar("M", bound=nn.Module)


def relu_dropout_norm(
    z: Tensor, dropout: Dropout | None, norm: nn.Module, rng: np.random.Generator | None = None
) -> Tensor:
    """norm(dropout(relu(z), rng)) for `z` (N, C) or channels-last (N, C, H, W)."""
    if not _just(norm, BatchNorm) or norm.has_ghosts():
        return norm(relu_dropout(z, dropout, rng))  # type: ignore[no-any-return]
    if dropout is not None and not _just(dropout, Dropout):
        return norm(relu_dropout(z, dropout, rng))  # type: ignore[no-any-return]
    dropped = dropout is not None and dropout.active()
    answers = not (norm.uses_batch() or dropped or torch.is_grad_enabled())
    shape = _matrix(z, norm) if norm.uses_batch() or answers else None
    if shape is None:
        return norm(relu_dropout(z, dropout, rng))  # type: ignore[no-any-return]
    norm.check(z)
    if answers:
        return _normalize_running(z, norm, kernels.RELU_BEFORE)
    drops = kernels.NONE_DROPPED if dropout is None else dropout.drops(z.numel(), rng)
    y: Tensor = _ReluDropoutBatchNorm.apply(z, norm.weight, norm.bias, norm, shape, drops)  # type: ignore[no-untyped-call]
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
        shape: tuple[int, int, int],
        drops: kernels.Drops,
    ) -> Tensor:
        group, count = norm.partners(), z.numel() // z.shape[1]
        if group is None:
            running = norm.running(count)
            y, h, mean, var = kernels.relu_dropout_batch_norm(
                z, shape, drops, weight, bias, norm.eps, running
            )
        else:
            h, mean, m2 = kernels.relu_dropout_moments(z, shape, drops)
            mean, var, count = norm.join(group, h, mean, m2)
            y = kernels.normalize(h, mean, var, weight, bias, norm.eps)
        ctx.save_for_backward(h, weight, mean, var)
        ctx.shape, ctx.eps, ctx.scale = shape, norm.eps, drops.scale
        ctx.group, ctx.count = group, count
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, mean, var = ctx.saved_tensors
        h = kernels.as_saved(h, ctx.shape)
        batch = h, ctx.shape, g, mean, var, weight, ctx.eps
        if ctx.group is None:
            grads = kernels.gradient(*batch, keep_scale=ctx.scale)
        else:
            grads = part_gradient(ctx.group, *batch, ctx.count, keep_scale=ctx.scale)
        return needed(ctx, *grads, None, None, None)


def relu_dropout(
    z: Tensor, dropout: Dropout | None, rng: np.random.Generator | None = None
) -> Tensor:
    """dropout(relu(z), rng) for `z` (N, C) or channels-last (N, C, H, W)."""
    if dropout is None:
        return relu(z)
    shape = kernels.layout(z)
    if not _just(dropout, Dropout) or not dropout.active() or shape is None or shape[2] > 1:
        return dropout(relu(z), rng)  # type: ignore[no-any-return]
    y: Tensor = _ReluDropout.apply(z, dropout.drops(z.numel(), rng))  # type: ignore[no-untyped-call]
    return y


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, drops: kernels.Drops) -> Tensor:
        h = kernels.relu_dropout(z, drops)
        ctx.save_for_backward(h)
        ctx.scale = drops.scale
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        return kernels.relu_dropout_gradient(h, g, ctx.scale), None


def norm_relu(x: Tensor, norm: nn.Module) -> Tensor:
    """relu(norm(x)) for `x` (N, C) or channels-last (N, C, H, W)."""
    if not _just(norm, BatchNorm) or norm.has_ghosts():
        return relu(norm(x))
    if (shape := _matrix(x, norm)) is None:
        return relu(norm(x))
    norm.check(x)
    if norm.uses_batch():
        y: Tensor = _BatchNormRelu.apply(x, norm.weight, norm.bias, norm, shape)  # type: ignore[no-untyped-call]
        return y
    if torch.is_grad_enabled():
        return relu(norm(x))
    return _normalize_running(x, norm, kernels.RELU_AFTER)


def _normalize_running(x: Tensor, norm: BatchNorm, relu: int) -> Tensor:
    """`norm` of `x` by the running statistics, with ReLU before or after it, without a gradient."""
    running = norm.running_mean, norm.running_var
    return kernels.normalize(x, *running, norm.weight, norm.bias, norm.eps, relu=relu)


def norm_add_relu(x: Tensor, norm: nn.Module, skipped: Tensor) -> Tensor:
    """relu(norm(x) + skipped) for `x` and `skipped` of one shape."""
    y: Tensor = norm(x)
    if not _just(norm, BatchNorm):
        return relu(y + skipped)
    return y.add_(skipped).relu_()  # what batch normalisation returns, nobody else has


class _BatchNormRelu(torch.autograd.Function):
    """What ReLU cut is computed anew from x, which takes less time than reading it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: BatchNorm,
        shape: tuple[int, int, int],
    ) -> Tensor:
        group, count = norm.partners(), x.numel() // x.shape[1]
        if group is None:
            running = norm.running(count)
            y, mean, var = kernels.batch_norm(x, shape, weight, bias, norm.eps, running, relu=True)
        else:
            mean, var, count = norm.join(group, x, *kernels.moments(x, shape))
            y = kernels.normalize(x, mean, var, weight, bias, norm.eps, relu=kernels.RELU_AFTER)
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.shape, ctx.eps, ctx.group, ctx.count = shape, norm.eps, group, count
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        x = kernels.as_saved(x, ctx.shape)
        batch = x, ctx.shape, g, mean, var, weight, ctx.eps
        affine: Any = {"bias": bias, "relu": True, "x_grad": ctx.needs_input_grad[0]}
        if ctx.group is None:
            grads = kernels.gradient(*batch, **affine)
        else:
            grads = part_gradient(ctx.group, *batch, ctx.count, **affine)
        return needed(ctx, *grads, None, None)


def norm_conv(x: Tensor, norm: nn.Module, conv: nn.Conv2d) -> Tensor:
    """conv(norm(x)) for pixels `x` (N, C, H, W), which need no gradient.

    Without padding, γ and β go through the convolution:

        conv(γ·x̂ + β; W) = conv(x̂; γ·W) + Σ W·β

    so that their gradients follow from that of the kernel, and the gradient with respect to the
    image, as costly as the convolution itself, is never computed.
    """
    if conv.bias is None or not _convolves_input(conv, x) or not x.numel():
        return conv(norm(x))  # type: ignore[no-any-return]
    gamma = beta = None
    if _batch_normalizes(norm) and norm.is_plain() == (x.dtype is torch.float32):
        norm.check(x)
        x, gamma, beta = norm.standardize(x), norm.weight, norm.bias
    else:
        x = norm(x)
        if x.requires_grad:  # by way of γ and β
            return conv(x)  # type: ignore[no-any-return]
    y: Tensor = _ConvOfInput.apply(  # type: ignore[no-untyped-call]
        x, conv.weight, conv.bias, gamma, beta, conv.stride, conv.dilation
    )
    return y


def _convolves_input(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `_ConvOfInput` does what `conv` would do of `x`, which a tracer may have replaced."""
    return (
        isinstance(x, Tensor)
        and not x.requires_grad
        and (_just(conv, Conv2d) or _just(conv, nn.Conv2d))
        and conv.padding == (0, 0)
        and conv.groups == 1
        and x.dtype == conv.weight.dtype
        and x.dtype not in HALF  # whose statistics are taken in float32
    )


class _ConvOfInput(torch.autograd.Function):
    """conv(γ·x + β) of an `x` that needs no gradient; γ and β may be None.

    PyTorch's own gradient of the bias costs as much as that of the kernel; a plain sum does not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        stride: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, gamma, beta)
        ctx.stride, ctx.dilation = stride, dilation
        plain = (*stride, *dilation) == (1, 1, 1, 1)
        ctx.compiled = plain and kernels.convolves_pixels(x, weight, bias, gamma, beta)
        if ctx.compiled:
            return kernels.conv_pixels(x, weight, bias, gamma, beta)
        if beta is not None:
            bias = bias + weight.sum((2, 3)) @ beta
        if gamma is not None:
            weight = weight * gamma[:, None, None]
        return conv2d(x, weight, bias, stride, dilation=dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gamma, beta = ctx.saved_tensors
        if ctx.compiled:
            grads = kernels.conv_pixels_gradients(x, weight, g, gamma, beta)
            return needed(ctx, None, *grads, None, None)
        gamma_grad = beta_grad = None
        _, weight_grad, _ = torch.ops.aten.convolution_backward(
            *(g, x, weight, None, ctx.stride, (0, 0), ctx.dilation, False, (0, 0), 1),
            output_mask=(False, True, False),
        )
        bias_grad = g.sum((0, 2, 3))
        if gamma is not None:
            gamma_grad = (weight_grad * weight).sum((0, 2, 3))
            weight_grad *= gamma[:, None, None]
        if beta is not None:
            beta_grad = bias_grad @ weight.sum((2, 3))
            weight_grad += torch.outer(bias_grad, beta)[:, :, None, None]
        return needed(ctx, None, weight_grad, bias_grad, gamma_grad, beta_grad, None, None)


def conv_pool(x: Tensor, conv: nn.Module, pool: nn.Module) -> Tensor:
    """pool(conv(x)) for `x` (N, C, H, W), without the map between where both are compiled."""
    if (
        not _just(conv, Conv2d)
        or conv.padding != (1, 1)
        or not _just(pool, MaxPool2d)
        or not pool.compiled(x)
        or not kernels.convolves(x, conv.weight, conv.bias)
    ):
        return pool(conv(x))  # type: ignore[no-any-return]
    if not torch.is_grad_enabled():
        return kernels.conv3x3_max_pool(x, conv.weight, conv.bias, conv.tiles_now())[0]
    y: Tensor = _ConvPool.apply(x, conv.weight, conv.bias, conv.tiles_now())  # type: ignore[no-untyped-call]
    return y


class _ConvPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tiles: kernels.Tiles
    ) -> Tensor:
        y, which = kernels.conv3x3_max_pool(x, weight, bias, tiles)
        ctx.save_for_backward(x, weight, which)
        ctx.tiles = tiles
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, which = ctx.saved_tensors
        x_grad = ctx.needs_input_grad[0]
        grads = kernels.conv3x3_gradients(x, weight, g, which, tiles=ctx.tiles, x_grad=x_grad)
        return needed(ctx, *grads, None)


class MaxPool2d(nn.MaxPool2d):
    """Maxima of windows; 2 × 2 ones of channels-last images remember them in a byte each."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, ⌊H/2⌋, ⌊W/2⌋) for 2 × 2 windows."""
        if not self.compiled(x):
            return super().forward(x)  # type: ignore[no-any-return]
        y: Tensor = _MaxPool.apply(x)  # type: ignore[no-untyped-call]
        return y

    def compiled(self, x: Tensor) -> bool:
        """Whether the compiled pass does this, of maps of the size of `x`."""
        shape = kernels.layout(x)
        if shape is None or shape[2] > 1 or x.ndim != 4 or min(x.shape[2:]) < 2:
            return False
        plain = (self.kernel_size, self.stride, self.padding, self.dilation) == (2, 2, 0, 1)
        return plain and not self.ceil_mode and not self.return_indices


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
    return _just(norm, BatchNorm) and not norm.has_ghosts() and norm.uses_batch()


def _matrix(x: Tensor, norm: BatchNorm) -> tuple[int, int, int] | None:
    """How `x` lies, where the compiled passes take it and `norm`, and it is a matrix."""
    shape = kernels.layout(x)
    fits = shape is not None and shape[2] == 1 and norm.is_plain()
    return shape if fits else None


def _just(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether `module` is a `kind` and nothing more: no subclass, no other `forward`, no hooks."""
    return type(module) is kind and not (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )
