"""Layers with their conventions stated where they bite."""

from collections.abc import Callable

from torch import nn

from normlab.errors import UserError
from normlab.layers.batchnorm import CONVENTIONS, BatchNorm, Convention, moments, normalize
from normlab.layers.conversion import convert_batchnorm
from normlab.layers.dropout import Dropout
from normlab.layers.fused import (
    MaxPool2d,
    conv_pool,
    norm_conv,
    norm_relu,
    relu_dropout,
    relu_dropout_norm,
)
from normlab.layers.norms import GroupNorm, InstanceNorm, LayerNorm
from normlab.layers.weights import Conv2d, Dense, Flatten, conv3x3


class NoNorm(nn.Identity):
    """The place of a normaliser that was left out; what passes it can still be looked at."""


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm,
    "none": lambda num_features: NoNorm(),
    "layer": LayerNorm,
    "group": GroupNorm,
    "instance": InstanceNorm,
}


def normalizer(norm: str, num_features: int) -> nn.Module:
    """Make the normaliser called `norm` for C = `num_features` channels.

    Raises:
        UserError: an unknown name.
    """
    if norm not in NORMS:
        raise UserError(f"unknown norm {norm!r}: choose one of {', '.join(NORMS)}")
    return NORMS[norm](num_features)


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
    "moments",
    "norm_conv",
    "norm_relu",
    "normalize",
    "normalizer",
    "relu_dropout",
    "relu_dropout_norm",
]
