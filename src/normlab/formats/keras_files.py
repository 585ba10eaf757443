"""Read a model that Keras saved: the description of its layers and its weights.

One reader for all forms: `.keras` of Keras 3 and of Keras 2.13 and later (a zip of JSON and HDF5),
and HDF5 as Keras 2 wrote it under `.keras` too: a whole model, or weights only. Keras itself is not
asked: it rebuilds a model by importing what the file names. Nothing in the file is run, links are
not followed, and the arrays may not take more bytes than the file has.

`read_keras` takes any network. `read_notebook` takes the notebook's, and refuses any other by the
name of the first layer that differs.
"""

import io
import json
import math
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from normlab.errors import DataError
from normlab.formats.keras_layout import WEIGHTS, notebook_layers
from normlab.formats.keras_layout import Layer as ExpectedLayer

Json = dict[str, Any]
Arrays = dict[str, NDArray[Any]]

_CONFIG, _HDF5 = "config.json", "model.weights.h5"
_ROOTS = ("layers", "_layer_checkpoint_dependencies")  # the second is Keras 2.13's and 2.14's
_TRAINING_ONLY = ("optimizer", "optimizer_weights", "metrics", "loss")


@dataclass(frozen=True)
class Layer:
    """A layer that the file describes.

    Attributes:
        name: its own behind those of the models and wrappers around it, such as `inner/bn`.
        kind: Keras' class, or one of the file's own.
        inputs: names of the layers that it takes, where the file says how they follow.
        place: the group of its weights in a `.keras` file.
    """

    name: str
    kind: str
    config: Json
    inputs: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Weights:
    """The arrays of one layer, as they lie together in the file.

    Attributes:
        place: the group that they lie in.
        name: the layer's own name; empty where the file does not say it.
        keys: what each is called: `gamma` and so on, or its number.
    """

    place: str
    name: str
    keys: tuple[str, ...]
    arrays: tuple[NDArray[Any], ...]


@dataclass(frozen=True)
class KerasModel:
    """What a file of Keras holds.

    Attributes:
        version: of the Keras that wrote it, where the file says so.
        description: what Keras would rebuild it from; None where the file holds weights only.
        layers: those described, in order, the ones inside others before these.
        ordered: whether it is described how the layers follow one another.
        weights: of all layers, described or not.
        steps: the optimiser's count of updates.
    """

    path: Path
    version: str
    description: Json | None
    layers: tuple[Layer, ...]
    ordered: bool
    weights: tuple[Weights, ...]
    arrays: Arrays
    steps: int | None

    def weights_of(self, layer: Layer) -> Weights | None:
        """The weights of `layer`, by their place or else by its name; None if they are not there.

        In HDF5 of Keras 2 a layer's weights lie under the outermost layer's name and its own.
        """
        outer, own = layer.name.partition("/")[0], layer.name.rpartition("/")[2]
        named = [w for w in self.weights if w.name == own]
        for w in self.weights:
            if w.place == layer.place:
                return w
        inside = [w for w in named if outer in w.place.split("/")]
        for found in (inside, named):
            if len(found) == 1:
                return found[0]
        return None


def read_keras(path: Path) -> KerasModel:
    """Read any model that Keras saved.

    Raises:
        DataError: the file is damaged, or is none of Keras'.
    """
    try:
        if zipfile.is_zipfile(path):
            return _from_zip(path)
        with h5py.File(path, "r") as f:
            return _from_hdf5(path, f)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: name a .keras or .h5 file") from None
    except DataError:
        raise
    except (
        *(AttributeError, LookupError, TypeError, ValueError, RuntimeError, ArithmeticError),
        *(OSError, RecursionError, EOFError, NotImplementedError, zipfile.BadZipFile),
    ) as e:
        raise DataError(f"{path} is not a whole model that Keras saved ({e})") from None


def _from_zip(path: Path) -> KerasModel:
    limit = os.path.getsize(path)
    with zipfile.ZipFile(path) as z:
        if "model.weights.json" in z.namelist():
            raise DataError(f"{path}: its weights lie in several parts: save it in one")
        description = json.loads(_member(path, z, _CONFIG, limit))
        content = _member(path, z, _HDF5, limit)
        metadata = {}
        if "metadata.json" in z.namelist():
            metadata = json.loads(_member(path, z, "metadata.json", limit))
    with h5py.File(io.BytesIO(content), "r") as f:
        return _model(path, str(metadata.get("keras_version", "")), description, f, len(content))


def _member(path: Path, z: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A file of the archive, stored as it is, so no larger than the whole."""
    info = z.getinfo(name)
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored or max(info.file_size, info.compress_size) > limit:
        raise DataError(f"{path}: {name} is compressed, which Keras never does: repack it")
    return z.read(info)


def _from_hdf5(path: Path, f: h5py.File) -> KerasModel:
    description = None
    if "model_config" in f.attrs:
        description = json.loads(_text(f.attrs["model_config"]))
    if description is not None and "training_config" in f.attrs:
        training = json.loads(_text(f.attrs["training_config"]))
        description["compile_config"] = {"optimizer": training.get("optimizer_config")}
    version = _text(f.attrs.get("keras_version", ""))
    return _model(path, version, description, f, os.path.getsize(path))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _model(
    path: Path, version: str, description: Json | None, f: h5py.File, limit: int
) -> KerasModel:
    arrays, names, steps = _datasets(path, f, limit)
    if description is None and not arrays:
        raise DataError(f"{path} holds neither a model nor weights: save one with model.save()")
    weights = _gathered(arrays, names)
    layers: list[Layer] = []
    ordered = False
    if description is not None:
        places = [*names, *(w.place for w in weights)]
        layers = list(_described(description, "", "", _Numbered(places)))
        ordered = isinstance(description["config"], list) or "layers" in description["config"]
    return KerasModel(path, version, description, tuple(layers), ordered, weights, arrays, steps)


def _datasets(path: Path, f: h5py.File, limit: int) -> tuple[Arrays, dict[str, str], int | None]:
    """All arrays of layers; the names of layers by group, where given; the count of updates.

    Only what lies in the file itself: `visititems` follows no link and visits nothing twice.

    limit: bytes of the file; the room that an array says it takes in it is a claim.
    """
    found: dict[str, h5py.Dataset] = {}
    names: dict[str, str] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item
        elif name == "vars" or name.endswith("/vars"):
            given = item.attrs.get("name", "")
            names[name[:-5]] = given if isinstance(given, str) else ""

    f.visititems(note)
    steps = None
    for name in [n for n in found if n.partition("/")[0] in _TRAINING_ONLY]:
        item = found.pop(name)
        if _counts_updates(name) and item.shape == () and item.dtype.kind in "iu":
            steps = int(item[()])
    taken = 0
    for name, item in found.items():
        if item.external or item.is_virtual:
            raise DataError(f"{path}: {name} is not stored in the file itself")
        if item.nbytes > item.id.get_storage_size():
            raise DataError(
                f"{path}: {name} claims {item.nbytes:,} bytes, more than the file has for it: it "
                "is compressed, which Keras never does, or damaged"
            )
        taken += item.nbytes
    if taken > limit:
        raise DataError(f"{path}: its arrays claim {taken:,} bytes, more than the file has")
    arrays = {name: _array(item) for name, item in found.items()}
    return {n: a for n, a in arrays.items() if a.dtype.kind in "biuf"}, names, steps


def _counts_updates(name: str) -> bool:
    return name == "optimizer/vars/0" or re.search(r"/iter(ations?)?(:0)?$", name) is not None


def _array(item: h5py.Dataset) -> NDArray[Any]:
    values: NDArray[Any] = np.asarray(item[()])
    if values.dtype.kind == "V" and values.dtype.itemsize == 2 and "dtype" in item.attrs:
        return (values.view("<u2").astype("<u4") << 16).view("<f4")  # bfloat16, as Keras notes it
    return values


def _gathered(arrays: Arrays, names: dict[str, str]) -> tuple[Weights, ...]:
    """Arrays by the group in which they lie: one layer's."""
    groups: dict[str, list[str]] = {}
    for name in arrays:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    found = []
    for group, members in groups.items():
        numbered = group == "vars" or group.endswith("/vars")
        keys = {m: m.rpartition("/")[2].removesuffix(":0") for m in members}
        if numbered:
            members = sorted(members, key=lambda m: (len(m), m))
        place = group[:-5] if numbered else group
        own = names.get(place, "") if numbered else place.rpartition("/")[2]
        found.append(
            Weights(place, own, tuple(keys[m] for m in members), tuple(arrays[m] for m in members))
        )
    return tuple(found)


class _Numbered:
    """Where the layers of a model lie: numbered within their class.

    Keras 2.13 counts each layer twice. So the groups of a class are taken in their order where
    there are as many as layers, and by their exact number otherwise.
    """

    def __init__(self, places: list[str]) -> None:
        self.children: dict[str, set[str]] = {}
        for place in places:
            parts = place.split("/")
            for i, part in enumerate(parts):
                self.children.setdefault("/".join(parts[:i]), set()).add(part)

    def places(self, group: str, kinds: list[str]) -> list[str]:
        """The groups of layers of these classes inside `group`, one each."""
        inside = self.children.get(group, set())
        root = next((r for r in _ROOTS if r in inside), _ROOTS[0])
        home = f"{group}/{root}" if group else root
        present: dict[str, list[tuple[int, str]]] = {}
        for child in self.children.get(home, ()):
            base, number = _base_and_number(child)
            present.setdefault(base, []).append((number, child))
        used, wanted = Counter[str](), Counter(_snake_case(kind) for kind in kinds)
        found = []
        for kind in map(_snake_case, kinds):
            i = used[kind]
            used[kind] += 1
            there = sorted(present.get(kind, []))
            exact = f"{kind}_{i}" if i else kind
            found.append(f"{home}/{there[i][1] if len(there) == wanted[kind] else exact}")
        return found


def _base_and_number(group: str) -> tuple[str, int]:
    base, _, number = group.rpartition("_")
    return (base, int(number)) if base and re.fullmatch(r"\d{1,9}", number) else (group, 0)


def _snake_case(name: str) -> str:
    """Keras' own way from a class to the name of its weights: Conv2D → conv2d, ReLU → re_lu."""
    name = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _described(model: Json, prefix: str, group: str, numbered: _Numbered) -> Iterator[Layer]:
    """The layers of a model in order, those inside others before these."""
    entries = _entries(model)
    in_a_line = not any("inbound_nodes" in entry for entry in entries)
    before: tuple[str, ...] = ()
    places = numbered.places(group, [entry["class_name"] for entry in entries])
    for entry, place in zip(entries, places, strict=True):
        name = prefix + _name(entry)
        if not in_a_line:
            before = tuple(prefix + source for source in _sources(entry.get("inbound_nodes")))
        inner: list[Layer] = []
        if _entries(entry):
            inner = list(_described(entry, f"{name}/", place, numbered))
            before = (inner[-1].name,) if inner else before
        else:
            inner = list(_wrapped(entry["config"], f"{name}/", place, numbered))
        yield from inner
        yield Layer(name, entry["class_name"], entry["config"], before, place)
        before = (name,)


def _wrapped(config: Json, prefix: str, place: str, numbered: _Numbered) -> Iterator[Layer]:
    """Layers among the settings of another one, such as TimeDistributed's."""
    for key, value in config.items():
        many = value if isinstance(value, list) else []
        inside = [entry for entry in many if _is_layer(entry)]
        kinds = [entry["class_name"] for entry in inside]
        listed = numbered.places(f"{place}/{key}", kinds)
        pairs = list(zip(inside, listed, strict=True))
        if _is_layer(value):
            pairs.append((value, f"{place}/{key}"))
        for entry, at in pairs:
            name = prefix + _name(entry)
            if _entries(entry):
                yield from _described(entry, f"{name}/", at, numbered)
            else:
                yield from _wrapped(entry["config"], f"{name}/", at, numbered)
            yield Layer(name, entry["class_name"], entry["config"], (), at)


def _is_layer(value: Any) -> bool:
    """Whether it describes a layer, and not an initialiser or a type of number."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("class_name"), str)
        and isinstance(value.get("config"), dict)
        and {"name", "trainable"} <= value["config"].keys()
    )


def _entries(model: Json) -> list[Json]:
    """The layers of a Sequential or functional model, whatever its class is called."""
    config = model["config"]
    layers = config if isinstance(config, list) else config.get("layers")
    return layers if isinstance(layers, list) else []


def _name(layer: Json) -> str:
    """A class of the file's own may leave it out of its settings."""
    name = layer["config"].get("name") or layer.get("name") or _snake_case(layer["class_name"])
    return str(name)


def _sources(value: Any) -> Iterator[str]:
    """Names of the layers whose outputs are mentioned anywhere in `inbound_nodes`.

    Keras 3 mentions them as `keras_history`, Keras 2 as [name, node, tensor, keywords].
    """
    if isinstance(value, dict):
        if isinstance(history := value.get("keras_history"), list) and history:
            yield str(history[0])
        value = [v for k, v in value.items() if k != "keras_history"]
    if isinstance(value, list):
        if len(value) in (3, 4) and isinstance(value[0], str) and isinstance(value[1], int):
            yield value[0]
        for item in value:
            yield from _sources(item)


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
    layers = _entries(model)
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


def _difference(theirs: Json | None, ours: ExpectedLayer | None) -> str:
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
    model: KerasModel, found: list[Json], expected: list[ExpectedLayer]
) -> dict[str, NDArray[np.float32]]:
    """Every weight under our name and in our layout."""
    described = {layer.name: layer for layer in model.layers}
    state = {}
    for theirs, ours in zip(found, expected, strict=True):
        stored = model.weights_of(described[_name(theirs)]) if ours.shapes else None
        for i, (key, shape) in enumerate(zip(_KEYS.get(ours.kind, ()), ours.shapes, strict=True)):
            array = _weight(model.path, _name(theirs), stored, (key, str(i)), shape)
            if array.ndim == 4:
                array = array.transpose(3, 2, 0, 1)  # (h, w, C, O) → (O, C, h, w)
            elif array.ndim == 2:
                array = array.T
            state[f"{ours.name}.{WEIGHTS[ours.kind][i]}"] = np.ascontiguousarray(array)
    return state


# What Keras 2 calls the weights; Keras 3 numbers them in this order.
_KEYS = {
    "BatchNormalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "Conv2D": ("kernel", "bias"),
    "Dense": ("kernel", "bias"),
}


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
