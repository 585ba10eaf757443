"""Describe a model that Keras saved, from what `normlab.formats.keras_files` reads of it.

A normaliser is found by its settings, whatever its class is called and whatever it is wrapped in,
and also by its weights where the file does not describe its layers: in a model of a class of its
own, or in a file of weights only.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normlab.diagnosis.network import Batches, Network, Node, Normalizer
from normlab.errors import UserError, install

if TYPE_CHECKING:
    from normlab.formats.keras_files import KerasModel, Layer, Weights

_MEANS = ("moving_mean", "running_mean")
_VARIANCES = ("moving_variance", "moving_var", "running_var")
_SETTINGS = {"momentum", "epsilon", "center", "scale"}
_WEIGHTS = re.compile(r"(Depthwise|Separable)?(Conv[123]D|Dense)(Transpose)?")
_DROPOUTS = re.compile(r"(Spatial|Gaussian|Alpha)?Dropout([123]D)?")

Vectors = dict[str, NDArray[np.float64]]


def read_keras(path: Path) -> Network:
    """Describe the model in a file of Keras.

    Raises:
        UserError: h5py is not installed.
        DataError: the file is damaged, or none that Keras saved.
    """
    try:
        from normlab.formats import keras_files
    except ImportError:
        raise UserError(f"{path}: Keras' files need h5py: {install('keras')}") from None
    return _describe(keras_files.read_keras(path))


def _describe(model: "KerasModel") -> Network:
    unread: dict[str, str] = {}
    found: list[Normalizer] = []
    waiting = [w for w in model.weights if _is_normalizer(w)]
    for layer in filter(_normalizes, model.layers):
        weights = model.weights_of(layer) or _one_inside(layer, waiting)
        waiting = [w for w in waiting if w is not weights]
        values = "its weights are not in the file" if weights is None else _vectors(weights, layer)
        if isinstance(values, str):
            unread[layer.name] = values
        else:
            found.append(_normalizer(layer, values, model.steps))
    for weights in waiting:  # in no description
        values = _vectors(weights)
        if isinstance(values, str):
            unread[_called(weights)] = values
        else:
            found.append(_undescribed(weights, values, model.steps))
    what = "model" if model.description is not None else "weights"
    return Network(
        path=str(model.path),
        kind=f"Keras {model.version} {what}" if model.version else f"Keras {what}",
        normalizers=tuple(found),
        tensors=model.arrays,
        graph=tuple(map(_node, model.layers)) if model.ordered else None,
        batches=Batches(accumulation=_accumulation(model.description)),
        unread=unread,
    )


def _normalizes(layer: "Layer") -> bool:
    """Whether it is a BatchNormalization or of a class derived from it."""
    return layer.kind == "BatchNormalization" or layer.config.keys() >= _SETTINGS


def _is_normalizer(weights: "Weights") -> bool:
    """Whether weights are a batch normalisation's, by their names or else by their shapes.

    Numbered ones have no names: four vectors of one length are γ, β, mean and variance. With two or
    three, without γ or β, the layer must be called a batch normalisation.
    """
    if not all(key.isdigit() for key in weights.keys):
        return any(key in _VARIANCES for key in weights.keys)
    shapes = {a.shape for a in weights.arrays}
    alike = len(shapes) == 1 and len(next(iter(shapes))) == 1
    called = "batch_norm" in f"{weights.place.rpartition('/')[2]} {weights.name}"
    return alike and (len(weights.arrays) == 4 or (called and len(weights.arrays) in (2, 3)))


def _one_inside(layer: "Layer", waiting: "list[Weights]") -> "Weights | None":
    """The only normaliser's weights below the outermost layer's name, if there is one."""
    outer = layer.name.partition("/")[0]
    inside = [w for w in waiting if outer in w.place.split("/")]
    return inside[0] if len(inside) == 1 else None


def _vectors(weights: "Weights", layer: "Layer | None" = None) -> Vectors | str:
    """γ, mean and variance as `weight`, `mean` and `var`; in words, why not."""
    keys, arrays = weights.keys, weights.arrays
    if all(key.isdigit() for key in keys):
        config = layer.config if layer is not None else {}
        scale, center = config.get("scale", len(keys) != 2), config.get("center", len(keys) == 4)
        order = ["weight"] * bool(scale) + ["bias"] * bool(center) + ["mean", "var"]
        if layer is None and len(keys) == 3:
            order = ["γ or β", "mean", "var"]  # which of the two is not said
        named = dict(zip(order, arrays, strict=False))
    else:
        there = dict(zip(keys, arrays, strict=True))
        named = {}
        for ours, theirs in (("weight", ("gamma",)), ("mean", _MEANS), ("var", _VARIANCES)):
            named.update((ours, there[key]) for key in theirs if key in there)
    values = {k: v.astype(np.float64) for k, v in named.items() if k in ("weight", "mean", "var")}
    if not {"mean", "var"} <= values.keys():
        return "its running statistics are not all in the file: links, or missing"
    if len({v.shape for v in values.values()}) != 1 or values["var"].ndim != 1:
        shapes = ", ".join(str(v.shape) for v in values.values())
        return f"its vectors have the shapes {shapes}"
    return values if values["var"].size else "it has no channels"


def _called(weights: "Weights") -> str:
    """The place in the file where that says more than the name, which Keras makes up by number."""
    return weights.place or weights.name or "model"


def _normalizer(layer: "Layer", values: Vectors, steps: int | None) -> Normalizer:
    trainable = bool(layer.config.get("trainable", True))
    return Normalizer(
        name=layer.name,
        running_mean=values["mean"],
        running_var=values["var"],
        weight=values.get("weight"),
        eps=_number(layer.config.get("epsilon")),
        decay=_number(layer.config.get("momentum")),
        steps=steps if trainable else None,  # a frozen one is in inference mode
        updates=trainable,
        trainable=trainable,
    )


def _undescribed(weights: "Weights", values: Vectors, steps: int | None) -> Normalizer:
    return Normalizer(
        name=_called(weights),
        running_mean=values["mean"],
        running_var=values["var"],
        weight=values.get("weight"),
        steps=steps,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _accumulation(description: dict[str, Any] | None) -> int | None:
    """Of the optimiser that the model was compiled with; None where it was not."""
    optimizer = ((description or {}).get("compile_config") or {}).get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("config"), dict):
        return None
    steps = optimizer["config"].get("gradient_accumulation_steps") or 1
    return steps if isinstance(steps, int) else None


def _node(layer: "Layer") -> Node:
    *_, (kind, config) = _unwrapped(layer.kind, layer.config)
    is_linear = config.get("activation") in (None, "linear")
    what = "other"
    if kind == "BatchNormalization" or config.keys() >= _SETTINGS:
        what = "normalizer"
    elif _WEIGHTS.fullmatch(kind) and is_linear:
        what = "weights"
    elif _DROPOUTS.fullmatch(kind) and (_number(config.get("rate")) or 0) > 0:
        what = "dropout"
    has_bias = bool(config.get("use_bias", False))
    return Node(name=layer.name, kind=what, inputs=layer.inputs, has_bias=has_bias)


def _unwrapped(kind: str, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The class and settings of a layer and, of one in TimeDistributed, of that inside."""
    yield kind, config
    inner = config.get("layer")
    if kind == "TimeDistributed" and isinstance(inner, dict):
        yield str(inner.get("class_name")), dict(inner.get("config", {}))
