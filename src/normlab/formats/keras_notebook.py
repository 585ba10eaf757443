"""The notebook's network out of a file of Keras, with batch normalisation or without.

Any other network is refused by the name of the first layer that differs.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.errors import DataError
from normlab.formats.keras_files import (
    Json,
    KerasModel,
    Weights,
    layers_in,
    name_of,
    read_keras,
)
from normlab.formats.keras_layout import WEIGHTS, notebook_layers
from normlab.formats.keras_layout import Layer as ExpectedLayer

# What Keras 2 calls the weights; Keras 3 numbers them in this order.
_KEYS = {
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Conv2D": ("kernel", "bias"),
    "Dense": ("kernel", "bias"),
}


@dataclass(frozen=True)
class KerasNotebook:
    """What a file holds: weights under the names of `NotebookNet`, and which normaliser."""

    state: dict[str, NDArray[np.float32]]
    norm: str


def read_notebook(path: Path, image_size: int, num_classes: int) -> KerasNotebook:
    """Read `path`, a network for images of `image_size` pixels and K = `num_classes`.

    Raises:
        DataError: it is not a whole file of Keras, or holds another network; the first layer that
            differs is named.
    """
    model = read_keras(path)
    if model.description is None:
        raise DataError(f"{path} holds weights only: save the whole model with model.save()")
    try:
        found = _line(path, model.description)
        norm = _check(path, found, image_size, num_classes)
        expected = notebook_layers(norm, image_size, num_classes)
        return KerasNotebook(_collect(model, _computing(found), expected), norm)
    except DataError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as e:
        raise DataError(f"{path} is not a whole model that Keras saved ({e})") from None


def _line(path: Path, model: Json) -> list[Json]:
    """The layers in the order they run.

    Raises:
        DataError: they do not form one line, or one is told to behave as in training.
    """
    config = model["config"]
    layers = layers_in(model)
    if model["class_name"] == "Sequential":
        return layers
    if model["class_name"] not in ("Functional", "Model"):
        raise DataError(f"{path} holds a {model['class_name']}: only Functional and Sequential can")
    before: list[str] = []
    for layer in layers:
        feeders, training = _inbound(layer["inbound_nodes"])
        if feeders != before or training:
            what = "called with training=True" if training else f"fed by {feeders}, not {before}"
            raise DataError(
                f"{path}: layer {name_of(layer)!r} is {what}: only the notebook's network can be "
                "read"
            )
        before = [name_of(layer)]
    if _strings(config["output_layers"]) != before:
        raise DataError(f"{path}: its output is not that of its last layer {before}: it must be")
    return layers


def _inbound(nodes: list[Any]) -> tuple[list[str], bool]:
    """The layers that feed a layer, and whether it is called with training=True."""
    feeders, training = [], False
    for node in nodes:
        if isinstance(node, dict):  # Keras 3
            feeders += [str(arg["config"]["keras_history"][0]) for arg in node["args"]]
            keywords = [node["kwargs"]]
        else:  # Keras 2: [[name, node, tensor, keywords], …]
            feeders += [str(tensor[0]) for tensor in node]
            keywords = [tensor[3] for tensor in node if len(tensor) > 3]
        training |= any(k.get("training") for k in keywords)
    return feeders, training


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [s for item in value for s in _strings(item)] if isinstance(value, list) else []


def _check(path: Path, found: list[Json], image_size: int, num_classes: int) -> str:
    """Return the normaliser of the network `found`.

    Raises:
        DataError: it is not the notebook's; the first layer that differs is named.
    """
    _check_input(path, found, image_size)
    kinds = [layer["class_name"] for layer in found]
    norm = "batch" if "BatchNormalization" in kinds else "none"
    computing = _computing(found)
    expected = notebook_layers(norm, image_size, num_classes)
    for i in range(max(len(computing), len(expected))):
        theirs = computing[i] if i < len(computing) else None
        ours = expected[i] if i < len(expected) else None
        difference = _difference(theirs, ours)
        if difference:
            raise DataError(f"{path}: {difference}; only the notebook's network can be read")
    return norm


def _computing(found: list[Json]) -> list[Json]:
    """The layers that decide the answers: no input, dropout or scaling by 1/255 before all else."""
    layers = [x for x in found if x["class_name"] not in ("InputLayer", "Dropout")]
    scaling = layers[0]["config"] if layers and layers[0]["class_name"] == "Rescaling" else None
    if scaling and math.isclose(scaling["scale"], 1 / 255) and scaling["offset"] == 0:
        return layers[1:]
    return layers


def _check_input(path: Path, found: list[Json], image_size: int) -> None:
    config = found[0]["config"]
    shape = config.get("batch_shape") or config.get("batch_input_shape")
    if list(shape or [])[1:] != [image_size, image_size, 3]:
        raise DataError(
            f"{path} takes inputs of shape {shape}, the data have images of "
            f"{image_size} × {image_size} × 3: give data that fit with --data, or another "
            "--image-size for pictures of your own"
        )


def _difference(theirs: Json | None, ours: ExpectedLayer | None) -> str:
    """In what a layer differs from the notebook's; empty if in nothing."""
    if theirs is None:
        return f"it ends where the notebook's network goes on with a {ours.kind if ours else ''}"
    called = f"layer {name_of(theirs)!r} ({theirs['class_name']})"
    if ours is None:
        return f"{called} comes after the last layer of the notebook's network"
    if theirs["class_name"] != ours.kind:
        return f"{called} stands where the notebook's network has a {ours.kind}"
    for key, value in ours.config.items():
        given = theirs["config"].get(key, value)
        if given != value:
            return f"{called} has {key}={given!r} where the notebook's network has {value!r}"
    return ""


def _collect(
    model: KerasModel, found: list[Json], expected: list[ExpectedLayer]
) -> dict[str, NDArray[np.float32]]:
    """Every weight under our name and in our layout."""
    described = {layer.name: layer for layer in model.layers}
    state = {}
    for theirs, ours in zip(found, expected, strict=True):
        stored = model.weights_of(described[name_of(theirs)]) if ours.shapes else None
        for i, (key, shape) in enumerate(zip(_KEYS.get(ours.kind, ()), ours.shapes, strict=True)):
            array = _weight(model.path, name_of(theirs), stored, (key, str(i)), shape)
            if array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)  # (h, w, C, O) → (O, C, h, w)
            elif array.ndim == 2:
                array = array.T
            state[f"{ours.name}.{WEIGHTS[ours.kind][i]}"] = np.ascontiguousarray(array)
    return state


def _weight(
    path: Path, layer: str, stored: Weights | None, keys: tuple[str, str], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """The array of a layer that goes by one of `keys`."""
    found = dict(zip(stored.keys, stored.arrays, strict=True)) if stored is not None else {}
    array = next((found[key] for key in keys if key in found), None)
    if array is None:
        raise DataError(
            f"{path}: the {keys[0]} of layer {layer!r} is not in the file: it is a link, or missing"
        )
    if array.shape != shape or array.dtype.kind != "f":
        raise DataError(
            f"{path}: the {keys[0]} of layer {layer!r} is {array.dtype} {array.shape}, the "
            f"notebook's network has float32 {shape} there"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError(
            f"{path}: the {keys[0]} of layer {layer!r} has values that are not finite: train that "
            "model again"
        )
    return array
