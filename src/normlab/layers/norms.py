"""Layer, RMS, group and instance normalisation: the formula of batch normalisation over other sets.

Each image is normalised by itself. Its C channels are cut into G groups of C/G, and over the
M = C/G·H·W values of a group:

    μ  = 1/M · Σ x                       `group_moments`
    σ² = 1/M · Σ (x − μ)²
    x̂  = (x − μ) / √(σ² + ε)             `GroupNorm.forward`
    y  = γ·x̂ + β                         γ and β per channel

    name           G                             source
    LayerNorm      1                             Ba et al. 2016, arXiv 1607.06450, over C, H, W
    RMSNorm        1, with μ = 0                 Zhang and Sennrich 2019, arXiv 1910.07467
    GroupNorm      largest divisor of C ≤ 32     Wu and He 2018, arXiv 1803.08494
    InstanceNorm   C                             Ulyanov et al. 2016, arXiv 1607.08022

Training and evaluation are the same, and nothing depends on the other images of the batch. ε is
1e-3, as Keras has it for all of them and as `BatchNorm` has it here; PyTorch has 1e-5.
"""

import torch
from torch import Tensor, nn

from normlab.errors import UserError

EPS = 1e-3
GROUPS = 32


def group_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group of `x` (N, G, C/G, *), both (N, G, 1, …).

    Two passes, never E[x²] − E[x]²: the variance cannot be negative.
    """
    dims = tuple(range(2, x.ndim))
    mean = x.mean(dims, keepdim=True)
    var = (x - mean).square().mean(dims, keepdim=True)
    return mean, var


class GroupNorm(nn.Module):
    """Normalise each image over groups of channels and over all pixels.

        >>> y = GroupNorm(64)(torch.randn(8, 64, 4, 4))
        >>> y.unflatten(1, (32, 2)).mean((2, 3, 4)).abs().max() < 1e-6
        tensor(True)

    Args:
        num_features: C, the size of dimension 1.
        num_groups: G, a divisor of C; the largest one up to 32 if None.
        eps: ε, added to the variance.

    Half-precision inputs are normalised in float32 and returned as they came.

    Raises:
        UserError: C < 1, or G is no divisor of it; in `forward`, an input of other dimensions or
            channels, or one with a single value a group, of which nothing would be left.
    """

    def __init__(
        self, num_features: int, num_groups: int | None = None, *, eps: float = EPS
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise UserError(f"num_features={num_features}: a normalisation needs ≥ 1 channel")
        self.num_features = num_features
        self.num_groups = default_groups(num_features) if num_groups is None else num_groups
        self.eps = eps
        if self.num_groups < 1 or num_features % self.num_groups:
            raise UserError(
                f"num_groups={num_groups}: choose a divisor of the {num_features} channels"
            )
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (N, C) or (N, C, *); same shape, type and memory layout out."""
        self._check(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        groups = wide.view(len(x), self.num_groups, -1, *x.shape[2:])  # (N, G, C/G, *)
        per_channel = (self.num_groups, -1, *[1] * (x.ndim - 2))  # (G, C/G, 1, …)
        mean, var = self.moments(groups)
        scale = (var + self.eps).rsqrt() * self.weight.view(per_channel)  # (N, G, C/G, 1, …)
        y = (groups - mean) * scale + self.bias.view(per_channel)
        return y.flatten(1, 2).to(x.dtype)

    @staticmethod
    def moments(groups: Tensor) -> tuple[Tensor, Tensor]:
        """μ and σ² of `groups` (N, G, C/G, *), both (N, G, 1, …)."""
        return group_moments(groups)

    def _check(self, x: Tensor) -> None:
        if not 2 <= x.ndim <= 5 or x.shape[1] != self.num_features:
            raise UserError(
                f"an input of shape {tuple(x.shape)}: "
                f"this layer takes 2 to 5 dimensions, the second of size {self.num_features}"
            )
        if x[0].numel() == self.num_groups:
            raise UserError(
                f"{type(self).__name__} on an input of shape {tuple(x.shape)}: with one value a "
                "group it would return β whatever the input; use batch or layer there"
            )

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}"


class LayerNorm(GroupNorm):
    """Normalise each image over all its channels and pixels: one group."""

    def __init__(self, num_features: int, *, eps: float = EPS) -> None:
        super().__init__(num_features, 1, eps=eps)


class RMSNorm(LayerNorm):
    """Divide each image by the root of its mean square; nothing is subtracted.

    The paper has no β. Here β stands for the bias that a normalised convolution does not have.
    """

    @staticmethod
    def moments(groups: Tensor) -> tuple[Tensor, Tensor]:
        """0 and the mean square."""
        square = groups.square().mean(tuple(range(2, groups.ndim)), keepdim=True)
        return torch.zeros_like(square), square


class InstanceNorm(GroupNorm):
    """Normalise each channel of each image over its pixels; undefined on vectors (N, C)."""

    def __init__(self, num_features: int, *, eps: float = EPS) -> None:
        super().__init__(num_features, num_features, eps=eps)


class NoNorm(nn.Identity):
    """The place of a normaliser that was left out; what passes it can still be looked at."""

    def __init__(self, num_features: int = 0, *, eps: float = EPS) -> None:
        super().__init__()


def default_groups(num_features: int) -> int:
    """The largest divisor of C up to 32.

    >>> default_groups(64), default_groups(48), default_groups(3)
    (32, 24, 3)
    """
    return max(g for g in range(1, min(num_features, GROUPS) + 1) if num_features % g == 0)
