"""Layers with their conventions stated where they bite."""

from torch import nn

from normlab.layers.batchnorm import CONVENTIONS, BatchNorm, Convention, moments, normalize
from normlab.layers.conversion import convert_batchnorm, convert_sync_batchnorm
from normlab.layers.dropout import Dropout
from normlab.layers.fused import (
    MaxPool2d,
    conv_pool,
    norm_add_relu,
    norm_conv,
    norm_relu,
    relu_dropout,
    relu_dropout_norm,
)
from normlab.layers.norms import GroupNorm, InstanceNorm, LayerNorm, NoNorm
from normlab.layers.weights import Conv2d, Dense, Flatten, conv3x3, use_tiles
from normlab.recipes.families import NORMS


def normalizer(
    norm: str, num_features: int, *, momentum: float = 0.99, epsilon: float = 1e-3
) -> nn.Module:
    """Make the normaliser called `norm` for C = `num_features` channels.

    Args:
        momentum: m of batch normalisation, running ← m·running + (1 − m)·batch.
        epsilon: ε, added to the variance.

    Raises:
        UserError: an unknown name.
    """
    kind = NORMS[norm]
    if kind is BatchNorm:
        return BatchNorm(num_features, momentum=momentum, eps=epsilon)
    layer: nn.Module = kind(num_features, eps=epsilon)
    return layer


__all__ = [
    "CONVENTIONS",
    "NORMS",
    "BatchNorm",
    "Conv2d",
    "Convention",
    "Dense",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "MaxPool2d",
    "NoNorm",
    "conv3x3",
    "conv_pool",
    "convert_batchnorm",
    "convert_sync_batchnorm",
    "moments",
    "norm_add_relu",
    "norm_conv",
    "norm_relu",
    "normalize",
    "normalizer",
    "relu_dropout",
    "relu_dropout_norm",
    "use_tiles",
]
