"""The notebook's network as Keras writes it: what an export writes and an import expects."""

from dataclasses import dataclass, field
from typing import Any

EPSILON = 1e-3  # of the notebook's normalisers
WEIGHTS = {
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
    "Conv2D": ("weight", "bias"),
    "Dense": ("weight", "bias"),
}
# Keras names a layer's place in `model.weights.h5` after its class.
SNAKE_CASE = {
    "BatchNormalization": "batch_normalization",
    "Conv2D": "conv2d",
    "Dense": "dense",
}


@dataclass(frozen=True)
class Layer:
    """A layer: Keras' class, our module's name, the settings that decide what it computes.

    Attributes:
        shapes: of its weights in Keras' layout, in Keras' order.
    """

    kind: str
    name: str
    config: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = field(default=())


def notebook_layers(norm: str, image_size: int, num_classes: int) -> list[Layer]:
    """The layers after the input, without dropout, which does nothing once trained."""
    side = (image_size - 2) // 2 // 2
    flat = side * side * 64
    layers = [
        _norm("batch_normalization", 3),
        _conv("conv1", 3, 32, "valid"),
        _norm("batch_normalization_1", 32),
        _conv("conv2", 32, 32, "same"),
        _pool("pool1"),
        _norm("batch_normalization_2", 32),
        _conv("conv3", 32, 64, "same"),
        _pool("pool2"),
        Layer("Flatten", "flatten", {"data_format": "channels_last"}),
        _norm("batch_normalization_3", flat),
        _dense("hidden", flat, 512, "relu"),
        _norm("batch_normalization_4", 512),
        _dense("output", 512, num_classes, "softmax"),
    ]
    return [x for x in layers if norm == "batch" or x.kind != "BatchNormalization"]


def _norm(name: str, size: int) -> Layer:
    config = {"epsilon": EPSILON, "center": True, "scale": True}
    return Layer("BatchNormalization", name, config, ((size,),) * 4)


def _conv(name: str, c_in: int, c_out: int, padding: str) -> Layer:
    config = {
        "filters": c_out,
        "kernel_size": [3, 3],
        "strides": [1, 1],
        "padding": padding,
        "data_format": "channels_last",
        "dilation_rate": [1, 1],
        "groups": 1,
        "activation": "relu",
        "use_bias": True,
    }
    return Layer("Conv2D", name, config, ((3, 3, c_in, c_out), (c_out,)))


def _pool(name: str) -> Layer:
    config = {
        "pool_size": [2, 2],
        "strides": [2, 2],
        "padding": "valid",
        "data_format": "channels_last",
    }
    return Layer("MaxPooling2D", name, config)


def _dense(name: str, c_in: int, c_out: int, activation: str) -> Layer:
    config = {"units": c_out, "activation": activation, "use_bias": True}
    return Layer("Dense", name, config, ((c_in, c_out), (c_out,)))
