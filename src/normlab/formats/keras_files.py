"""Read the notebook's network from a `.keras` or `.h5` file of Keras 3 or Keras 2.

Nothing in the file is run: the description is JSON, the weights are arrays, and any layer that the
notebook's network does not have is refused by its name. Memory is bounded by the file's size.
"""

import io
import json
import math
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from normlab.errors import DataError
from normlab.formats.keras_layout import SNAKE_CASE, WEIGHTS, Layer, notebook_layers

Json = dict[str, Any]


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
    try:
        # Keras up to 2.12 wrote HDF5 under either name.
        if path.suffix == ".keras" and zipfile.is_zipfile(path):
            return _read_keras(path, image_size, num_classes)
        if path.suffix in (".keras", ".h5", ".hdf5"):
            with h5py.File(path, "r") as f:
                return _read_legacy(path, f, image_size, num_classes)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: name a .keras or .h5 file") from None
    except DataError:
        raise
    except (
        *(AttributeError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError),
        *(OSError, RecursionError, EOFError, NotImplementedError, zipfile.BadZipFile),
    ) as e:
        raise DataError(f"{path} is not a whole model that Keras saved ({e})") from None
    raise DataError(f"{path}: name a .keras or .h5 file")


def _read_keras(path: Path, image_size: int, num_classes: int) -> KerasNotebook:
    limit = os.path.getsize(path)
    with zipfile.ZipFile(path) as z:
        parts = {}
        for name in ("config.json", "model.weights.h5"):
            info = z.getinfo(name)
            stored = info.compress_type == zipfile.ZIP_STORED
            if not stored or max(info.file_size, info.compress_size) > limit:
                raise DataError(f"{path}: {name} is compressed, which Keras never does: repack it")
            parts[name] = z.read(info)
    found = _layers(path, json.loads(parts["config.json"]))
    norm = _check(path, found, image_size, num_classes)
    layers = notebook_layers(norm, image_size, num_classes)
    with h5py.File(io.BytesIO(parts["model.weights.h5"]), "r") as f:
        places = _places(found, f)
        return _collect(
            path, f, found, layers, norm, limit, lambda name, i: f"{places[name]}/vars/{i}"
        )


def _places(found: list[Json], f: h5py.File) -> dict[str, str]:
    """Where each layer's weights lie, by the layer's name: numbered within its class.

    Keras 2.13 and 2.14 have another folder for them than Keras 2.15 and 3, and Keras 2.13 counts
    each layer twice.
    """
    root, step = "layers", 1
    if root not in set(f):  # unlike `in f`, a set of names follows no link
        root = "_layer_checkpoint_dependencies"
        if isinstance(f.get(root, getlink=True), h5py.HardLink) and "dense_2" in set(f[root]):
            step = 2
    used = Counter[str]()
    places = {}
    for layer in found:
        kind = SNAKE_CASE.get(layer["class_name"])
        if kind:
            number = used[kind]
            used[kind] += step
            places[_name(layer)] = f"{root}/{kind}{f'_{number}' if number else ''}"
    return places


def _read_legacy(path: Path, f: h5py.File, image_size: int, num_classes: int) -> KerasNotebook:
    if "model_config" not in f.attrs:
        raise DataError(f"{path} holds weights only: save the whole model with model.save()")
    found = _layers(path, json.loads(_text(f.attrs["model_config"])))
    norm = _check(path, found, image_size, num_classes)

    def place(name: str, i: int) -> str:
        folder = f"model_weights/{name}"
        return f"{folder}/{_text(_inside(path, f, folder).attrs['weight_names'][i])}"

    layers = notebook_layers(norm, image_size, num_classes)
    return _collect(path, f, found, layers, norm, os.path.getsize(path), place)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _name(layer: Json) -> str:
    return str(layer["config"]["name"])


def _layers(path: Path, model: Json) -> list[Json]:
    """The layers in the order they run.

    Raises:
        DataError: they do not form one line, or one is told to behave as in training.
    """
    config = model["config"]
    layers: list[Json] = config if isinstance(config, list) else config["layers"]
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
                f"{path}: layer {_name(layer)!r} is {what}: only the notebook's network can be read"
            )
        before = [_name(layer)]
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


def _difference(theirs: Json | None, ours: Layer | None) -> str:
    """In what a layer differs from the notebook's; empty if in nothing."""
    if theirs is None:
        return f"it ends where the notebook's network goes on with a {ours.kind if ours else ''}"
    called = f"layer {_name(theirs)!r} ({theirs['class_name']})"
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
    path: Path,
    f: h5py.File,
    found: list[Json],
    expected: list[Layer],
    norm: str,
    limit: int,
    place: Callable[[str, int], str],
) -> KerasNotebook:
    """Read every weight; `place` says where the i-th one of a layer is."""
    state = {}
    for theirs, ours in zip(_computing(found), expected, strict=True):
        for i, shape in enumerate(ours.shapes):
            array = _array(path, f, place(_name(theirs), i), shape, limit)
            if array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)  # (h, w, C, O) → (O, C, h, w)
            elif array.ndim == 2:
                array = array.T
            key = f"{ours.name}.{WEIGHTS[ours.kind][i]}"
            state[key] = np.ascontiguousarray(array)
    return KerasNotebook(state, norm)


def _inside(path: Path, f: h5py.File, place: str) -> Any:
    """What stands at `place`, by hard links only: others may lead to other files."""
    node: Any = f
    for part in place.split("/"):
        if not isinstance(node.get(part, getlink=True), h5py.HardLink):
            raise DataError(f"{path}: {place} is a link, which Keras never writes")
        node = node[part]
    return node


def _array(path: Path, f: h5py.File, place: str, shape: tuple[int, ...], limit: int) -> np.ndarray:
    node = _inside(path, f, place)
    if not isinstance(node, h5py.Dataset) or node.external or node.is_virtual:
        raise DataError(f"{path}: {place} is not an array in this file")
    if node.shape != shape or node.dtype.kind != "f":
        raise DataError(
            f"{path}: {place} holds {node.dtype} {node.shape}, the notebook's network has "
            f"float32 {shape} there"
        )
    if node.nbytes > limit:
        raise DataError(f"{path}: {place} claims {node.nbytes:,} bytes, more than the file has")
    array: np.ndarray = node[()].astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"{path}: {place} holds values that are not finite: train that model again")
    return array
