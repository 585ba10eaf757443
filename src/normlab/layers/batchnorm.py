"""Batch normalisation: formula, then code, in the same order and with the same symbols.

For each channel, over the M = N·H·W values that a batch holds of it (Ioffe and Szegedy 2015,
arXiv 1502.03167, algorithm 1):

    μ  = 1/M · Σ x                       `moments`
    σ² = 1/M · Σ (x − μ)²
    x̂  = (x − μ) / √(σ² + ε)             `normalize`
    y  = γ·x̂ + β

and, while training, the running statistics that evaluation uses in place of μ and σ²:

    running ← m·running + (1 − m)·batch

What libraries mean by the same words differs; `Convention` holds it and each has a name:

    name     ε      "momentum" weighs     default   running variance is
    keras    1e-3   the old value (m)     0.99      biased,   Σ(x − μ)²/M
    torch    1e-5   the new one (1 − m)   0.1       unbiased, Σ(x − μ)²/(M − 1)
    onnx     1e-5   the old value (m)     0.9       biased

All three normalise with the biased variance. The state's names are PyTorch's: γ is `weight`, β is
`bias`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normlab import kernels
from normlab.errors import UserError


@dataclass(frozen=True)
class Convention:
    """What a library means by "momentum", by the running variance, and its default ε."""

    name: str
    eps: float
    momentum: float
    momentum_weighs_old: bool
    unbiased_running_var: bool


CONVENTIONS = {
    "keras": Convention("keras", 1e-3, 0.99, momentum_weighs_old=True, unbiased_running_var=False),
    "torch": Convention("torch", 1e-5, 0.1, momentum_weighs_old=False, unbiased_running_var=True),
    "onnx": Convention("onnx", 1e-5, 0.9, momentum_weighs_old=True, unbiased_running_var=False),
}


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel.

    The values are taken relative to the channel's first one, so that a large mean costs no
    precision and a constant channel has exactly its value as mean and exactly 0 as variance.
    Two passes, never E[x²] − E[x]²: the variance cannot be negative.

    Args:
        x: (N, C) or (N, C, *), float32 or float64.

    Returns:
        μ and σ², both (C,).
    """
    dims = [0, *range(2, x.ndim)]
    first = x.detach()[(0, slice(None), *[0] * (x.ndim - 2))]  # (C,)
    d = x - per_channel(first, x)
    d_mean = d.mean(dims)
    var = (d - per_channel(d_mean, x)).square_().mean(dims)
    return first + d_mean, var


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """γ·(x − μ)/√(σ² + ε) + β, with every vector (C,) and `x` (N, C) or (N, C, *)."""
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = (x - per_channel(mean, x)) * per_channel(scale, x)
    return y if bias is None else y + per_channel(bias, x)


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View `v` (C,) so that it broadcasts along the channels of `x` (N, C, *)."""
    return v.view(1, -1, *[1] * (x.ndim - 2))


class _BatchNormalize(torch.autograd.Function):
    """`moments` and `normalize` with the gradient in closed form.

    With g = dL/dy, M values a channel and all sums over those values:

        dβ = Σ g
        dγ = Σ g·x̂
        dx = γ/(M·√(σ² + ε)) · (M·g − Σ g − x̂·Σ g·x̂)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        compiled = kernels.layout(x) is not None
        mean, var = kernels.moments(x) if compiled else moments(x)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        apply = kernels.normalize if compiled else normalize
        return apply(x, mean, var, weight, bias, eps), mean, var

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        if kernels.layout(x) is not None:
            grads = kernels.gradient(
                x, g, mean, var, weight, ctx.eps, x_grad=ctx.needs_input_grad[0]
            )
            return (
                *(
                    d if need else None
                    for d, need in zip(grads, ctx.needs_input_grad, strict=False)
                ),
                None,
            )
        dims = [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1]
        x_hat = normalize(x, mean, var, None, None, ctx.eps)
        bias_grad = g.sum(dims)
        weight_grad = (g * x_hat).sum(dims)
        x_grad = None
        if ctx.needs_input_grad[0]:
            scale = (var + ctx.eps).rsqrt()
            if weight is not None:
                scale = scale * weight
            x_grad = g - per_channel(bias_grad / count, x)
            x_grad = x_grad - x_hat * per_channel(weight_grad / count, x)
            x_grad = x_grad * per_channel(scale, x)
        return (
            x_grad,
            weight_grad if ctx.needs_input_grad[1] else None,
            bias_grad if ctx.needs_input_grad[2] else None,
            None,
        )


class BatchNorm(nn.Module):
    """Batch normalisation over all dimensions but the second, for inputs of 2 to 5 dimensions.

    In training it normalises with the batch's own statistics and moves the running ones towards
    them; in evaluation (`.eval()`), and when frozen, it uses the running ones and changes nothing.

        >>> bn = BatchNorm(3)
        >>> y = bn(torch.randn(8, 3, 4, 4))
        >>> y.mean((0, 2, 3)).abs().max() < 1e-6
        tensor(True)

    Args:
        num_features: C, the size of dimension 1.
        convention: `keras`, `torch` or `onnx`; see the module's table.
        momentum: as the convention understands it; its default if None.
        eps: ε, added to the variance; the convention's default if None.
        scale: learn γ (`weight`).
        center: learn β (`bias`).

    Half-precision inputs are normalised in float32 and returned as they came.

    Raises:
        UserError: unknown convention, C < 1, momentum outside [0, 1], ε < 0; in `forward`, an
            input of other dimensions or channels, or one that holds a single value a channel
            while training, whose variance would be 0.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        convention: str = "keras",
        momentum: float | None = None,
        eps: float | None = None,
        scale: bool = True,
        center: bool = True,
    ) -> None:
        super().__init__()
        if convention not in CONVENTIONS:
            known = ", ".join(CONVENTIONS)
            raise UserError(f"unknown convention {convention!r}: choose one of {known}")
        self.convention = CONVENTIONS[convention]
        self.num_features = num_features
        self.momentum = self.convention.momentum if momentum is None else momentum
        self.eps = self.convention.eps if eps is None else eps
        self.frozen = False
        if num_features < 1:
            raise UserError(f"num_features={num_features}: a batch normalisation needs ≥ 1 channel")
        if not 0 <= self.momentum <= 1:
            raise UserError(f"momentum={self.momentum}: choose a value from 0 to 1")
        if not self.eps >= 0:
            raise UserError(f"eps={self.eps}: choose a value ≥ 0")
        self.weight = nn.Parameter(torch.ones(num_features)) if scale else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if center else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    @property
    def old_weight(self) -> float:
        """m: how much of the old running statistics one step keeps, whatever the convention."""
        return self.momentum if self.convention.momentum_weighs_old else 1 - self.momentum

    def freeze(self, frozen: bool = True) -> "BatchNorm":
        """Use running statistics and learn nothing, also after `.train()`, until unfrozen."""
        self.frozen = frozen
        for parameter in self.parameters():
            parameter.requires_grad_(not frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (N, C) or (N, C, *); same shape, type and memory layout out."""
        self.check(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if self.training and not self.frozen:
            y, mean, var = self._normalize_batch(wide)
            self.track(mean, var, x.numel() // self.num_features)
        else:
            mean, var = self.running_mean, self.running_var
            y = normalize(wide, mean, var, self.weight, self.bias, self.eps)
        return y.to(x.dtype)

    def _normalize_batch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = _BatchNormalize.apply(x, self.weight, self.bias, self.eps)
        return y, mean, var

    @torch.no_grad()
    def track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics: running ← m·running + (1 − m)·batch."""
        if self.convention.unbiased_running_var:
            var = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), 1 - self.old_weight)
        self.running_var.lerp_(var.to(self.running_var.dtype), 1 - self.old_weight)
        self.num_batches_tracked += 1

    def check(self, x: Tensor) -> None:
        """Raise `UserError` unless `x` is what `forward` takes now."""
        if not 2 <= x.ndim <= 5 or x.shape[1] != self.num_features:
            raise UserError(
                f"an input of shape {tuple(x.shape)}: "
                f"this layer takes 2 to 5 dimensions, the second of size {self.num_features}"
            )
        count = x.numel() // self.num_features
        if self.training and not self.frozen and count < 2:
            raise UserError(
                f"a training batch of shape {tuple(x.shape)} holds {count} value(s) a channel, too "
                "few for a variance: use a batch of two or more, or .eval() or .freeze()"
            )

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, convention={self.convention.name!r}, momentum={self.momentum}, "
            f"eps={self.eps}, scale={self.weight is not None}, center={self.bias is not None}"
            + (", frozen" if self.frozen else "")
        )
