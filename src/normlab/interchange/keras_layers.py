"""normlab's networks as lists of Keras layers with their weights."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from normlab.errors import UserError
from normlab.formats.keras_layout import WEIGHTS, notebook_layers
from normlab.interchange.steps import batch_norm
from normlab.models import FastNet, NotebookNet
from normlab.models.fast import Block

Arrays = list[NDArray[np.float32]]


@dataclass(frozen=True)
class KerasLayer:
    """A layer: Keras' class, its settings with its name, its weights in Keras' order and layout."""

    kind: str
    config: dict[str, Any]
    weights: Arrays = field(default_factory=list)


def layers_of(model: nn.Module, image_size: int) -> list[KerasLayer]:
    """The layers that compute what `model` does, from pixels 0 … 255 to probabilities.

    Raises:
        UserError: a network or a normaliser that has no Keras form here.
    """
    if isinstance(model, FastNet):
        return _fast(model)
    if not isinstance(model, NotebookNet):
        raise UserError(
            f"network {type(model).__name__} cannot be written as Keras: only NotebookNet and "
            "FastNet can"
        )
    if model.norm_first:
        raise UserError(
            "norm_position=before cannot be written as Keras, only after can: use --format onnx"
        )
    return _notebook(model, image_size)


def _notebook(model: NotebookNet, image_size: int) -> list[KerasLayer]:
    dropouts = {"conv1": "dropout", "flatten": "dropout_1", "hidden": "dropout_2"}
    state = model.state_dict()
    layers = [KerasLayer("Rescaling", {"scale": 1 / 255, "offset": 0.0, "name": "scaling"})]
    for layer in notebook_layers("batch", image_size, model.output.out_features):
        if layer.kind == "BatchNormalization":
            layers += _norm(layer.name, model.get_submodule(layer.name))
            continue
        config = {**layer.config, "name": layer.name}
        scale = model.logit_scale if layer.name == "output" else 1
        keys = WEIGHTS.get(layer.kind, ())
        weights = [_array(scale * state[f"{layer.name}.{key}"]) for key in keys]
        layers.append(KerasLayer(layer.kind, config, weights))
        if layer.name in dropouts:
            layers.append(KerasLayer("Dropout", {"rate": 0.2, "name": dropouts[layer.name]}))
    return layers


def _fast(model: FastNet) -> list[KerasLayer]:
    offset = (-model.whitening.mean.double()).tolist()
    whitening = _conv("whitening", model.whitening.kernel, None, activation="relu")
    # The whitening is computed from images and never trained, in Keras no more than here.
    whitening.config["trainable"] = False
    layers = [
        KerasLayer("Rescaling", {"scale": 1 / 255, "offset": offset, "name": "centring"}),
        whitening,
    ]
    for i, block in enumerate(model.blocks, 1):
        assert isinstance(block, Block)
        if block.skips:
            raise UserError(
                "a network whose blocks add their input cannot be written as Keras, whose layers "
                "stand in a row here: use --format onnx"
            )
        layers.append(_conv(f"conv{i}", block.conv.weight, block.conv.bias))
        if isinstance(block.pool, nn.MaxPool2d):
            layers.append(KerasLayer("MaxPooling2D", {"pool_size": 2, "name": f"pool{i}"}))
        norms = _norm(f"norm{i}", block.norm)
        relu = KerasLayer("Activation", {"activation": "relu", "name": f"relu{i}"})
        layers += [relu, *norms] if block.norm_last else [*norms, relu]
    output = model.output.weight * model.logit_scale
    config = {"units": len(output), "activation": "softmax", "use_bias": False, "name": "output"}
    return [
        *layers,
        KerasLayer("GlobalMaxPooling2D", {"name": "maximum"}),
        KerasLayer("Dense", config, [_array(output)]),
    ]


def _conv(name: str, kernel: Tensor, bias: Tensor | None, activation: str = "linear") -> KerasLayer:
    config = {
        "filters": len(kernel),
        "kernel_size": list(kernel.shape[2:]),
        "padding": "same",
        "activation": activation,
        "use_bias": bias is not None,
        "name": name,
    }
    return KerasLayer("Conv2D", config, [_array(t) for t in (kernel, bias) if t is not None])


def _norm(name: str, place: nn.Module) -> list[KerasLayer]:
    """No layer at all where the network has no normaliser."""
    norm = batch_norm(place)
    if norm is None:
        return []
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    config = {
        # How much the old value weighs, which is what Keras, too, calls so.
        "momentum": norm.momentum,
        "epsilon": norm.eps,
        "scale": norm.weight is not None,
        "center": norm.bias is not None,
        "name": name,
    }
    weights = [_array(t) for t in tensors if t is not None]
    return [KerasLayer("BatchNormalization", config, weights)]


def _array(tensor: Tensor) -> NDArray[np.float32]:
    """`tensor` in Keras' layout: (O, C, h, w) → (h, w, C, O), (O, C) → (C, O)."""
    array = tensor.detach().cpu().numpy()
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif array.ndim == 2:
        array = array.T
    return np.ascontiguousarray(array)
