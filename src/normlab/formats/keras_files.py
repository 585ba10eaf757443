"""Read a model that Keras saved: the description of its layers and its weights.

One reader for all forms: `.keras` of Keras 3 and of Keras 2.13 and later (a zip of JSON and HDF5),
and HDF5 as Keras 2 wrote it under `.keras` too: a whole model, or weights only. Keras itself is not
asked: it rebuilds a model by importing what the file names. Nothing in the file is run, links are
not followed, and the arrays may not take more bytes than the file has.

`read_keras` takes any network; `normlab.formats.keras_notebook` takes the notebook's out of it.
"""

import io
import json
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
    entries = layers_in(model)
    in_a_line = not any("inbound_nodes" in entry for entry in entries)
    before: tuple[str, ...] = ()
    places = numbered.places(group, [entry["class_name"] for entry in entries])
    for entry, place in zip(entries, places, strict=True):
        name = prefix + name_of(entry)
        if not in_a_line:
            before = tuple(prefix + source for source in _sources(entry.get("inbound_nodes")))
        inner: list[Layer] = []
        if layers_in(entry):
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
            name = prefix + name_of(entry)
            if layers_in(entry):
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


def layers_in(model: Json) -> list[Json]:
    """The layers of a Sequential or functional model, whatever its class is called."""
    config = model["config"]
    layers = config if isinstance(config, list) else config.get("layers")
    return layers if isinstance(layers, list) else []


def name_of(layer: Json) -> str:
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
