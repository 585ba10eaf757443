"""Describe a `.keras` file from its JSON and its HDF5 weights; Keras itself is not asked.

Keras rebuilds a model by importing what the file names. Here the configuration is only read, and
the weights are taken by their place: `layers/<class in snake case>[_<n>]/vars/<i>`, numbered in the
order in which the configuration lists the layers of a model.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.diagnosis.patient import Batches, Node, Normalizer, Patient
from normlab.errors import DataError, UserError

Arrays = dict[str, NDArray[Any]]

_MODELS = ("Sequential", "Functional", "Model")
_WEIGHTS = re.compile(r"(Depthwise|Separable)?(Conv[123]D|Dense)(Transpose)?")
_DROPOUTS = re.compile(r"(Spatial|Gaussian|Alpha)?Dropout([123]D)?")


@dataclass(frozen=True)
class Layer:
    """A layer of the configuration, with the group of its weights and what it takes."""

    name: str
    kind: str
    config: dict[str, Any]
    group: str
    inputs: tuple[str, ...]


def read_keras(path: Path) -> Patient:
    """Describe the model in a `.keras` file.

    Raises:
        UserError: h5py is not installed.
        DataError: the file is damaged, or not one that Keras 3 saves of a model made of layers.
    """
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: reading .keras needs h5py: install normlab[keras]") from None
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            config = json.loads(_member(archive, "config.json", size))
            weights = _member(archive, "model.weights.h5", size)
        with h5py.File(io.BytesIO(weights), "r") as h5:
            return _describe(str(path), config, _datasets(h5, len(weights)))
    except UserError:
        raise
    except (
        *(zipfile.BadZipFile, LookupError, TypeError, ValueError, OSError, RuntimeError),
        *(AttributeError, EOFError, ArithmeticError, NotImplementedError),
    ) as e:
        raise DataError(f"{path} is not a whole .keras file ({e!r})") from None


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A file of the archive, stored as it is, so no larger than the whole."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or max(info.file_size, info.compress_size) > limit:
        raise DataError(f"{name} is compressed, which Keras never does: repack it")
    return archive.read(info)


def _describe(path: str, config: dict[str, Any], stored: Arrays) -> Patient:
    layers = list(_layers(config, "", ""))
    if not layers:
        raise DataError(
            f"{path} holds a {config.get('class_name')!r} of its own making: only Sequential and "
            "functional models say how their layers follow"
        )
    steps = _steps(stored)
    normalizers = [_normalizer(x, stored, steps) for x in layers if x.kind == "BatchNormalization"]
    return Patient(
        path=path,
        kind="Keras model",
        normalizers=tuple(normalizers),
        tensors={k: v for k, v in stored.items() if not k.startswith("optimizer/")},
        graph=tuple(_node(x) for x in layers),
        batches=Batches(accumulation=_accumulation(config)),
    )


def _datasets(h5: Any, limit: int) -> Arrays:
    """All arrays that are in the file itself: links are not followed, nor is outside storage.

    limit: bytes of the file; the room that an array says it takes in it is a claim.
    """
    found: Arrays = {}
    total = 0

    def note(name: str, item: Any) -> None:
        if not hasattr(item, "shape"):
            return
        if item.external or item.is_virtual or item.nbytes > min(limit, item.id.get_storage_size()):
            raise ValueError(f"{name} is not stored in the file")
        nonlocal total
        total += item.nbytes
        if total > limit:
            raise ValueError(f"{name} lies where other arrays lie: together they exceed the file")
        found[name] = np.asarray(item)

    h5.visititems(note)
    return found


def _layers(model: dict[str, Any], prefix: str, group: str) -> Iterator[Layer]:
    """The layers of a model in order, those of models inside it among them."""
    config = model["config"]
    if model["class_name"] not in _MODELS or "layers" not in config:
        return
    used: dict[str, int] = {}
    before: tuple[str, ...] = ()
    for entry in config["layers"]:
        kind, own = entry["class_name"], entry["config"]
        snake = _snake_case(kind)
        used[snake] = used.get(snake, -1) + 1
        place = f"{group}layers/{snake}" + (f"_{used[snake]}" if used[snake] else "")
        name = prefix + own["name"]
        if model["class_name"] != "Sequential":
            before = tuple(prefix + source for source in _sources(entry.get("inbound_nodes")))
        if kind in _MODELS:
            inner = list(_layers(entry, f"{name}/", f"{place}/"))
            yield from inner
            before = (inner[-1].name,) if inner else before
        yield Layer(name, kind, own, place, before)
        before = (name,)


def _sources(value: Any) -> Iterator[str]:
    """Names of the layers whose outputs are mentioned anywhere in `inbound_nodes`."""
    if isinstance(value, dict):
        if isinstance(history := value.get("keras_history"), list) and history:
            yield str(history[0])
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _sources(item)


def _snake_case(name: str) -> str:
    """Keras' own way from a class to the name of its weights: Conv2D → conv2d, ReLU → re_lu."""
    name = re.sub(r"(.)([A-Z][a-z0-9]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _steps(stored: Arrays) -> int | None:
    """The optimiser's count of updates, its first variable, where the file has it."""
    value = stored.get("optimizer/vars/0")
    counts = value is not None and value.shape == () and value.dtype.kind in "iu"
    return int(value) if value is not None and counts else None


def _accumulation(config: dict[str, Any]) -> int | None:
    """Of the optimiser that the model was compiled with; None where it was not."""
    optimizer = (config.get("compile_config") or {}).get("optimizer")
    if not isinstance(optimizer, dict):
        return None
    return int(optimizer["config"].get("gradient_accumulation_steps") or 1)


def _normalizer(layer: Layer, stored: Arrays, steps: int | None) -> Normalizer:
    config = layer.config
    wanted = ["gamma"] * bool(config["scale"]) + ["beta"] * bool(config["center"])
    order = [*wanted, "mean", "var"]
    places = {key: f"{layer.group}/vars/{i}" for i, key in enumerate(order)}
    values = {key: stored[place].astype(np.float64) for key, place in places.items()}
    trainable = bool(config.get("trainable", True))
    return Normalizer(
        name=layer.name,
        running_mean=values["mean"],
        running_var=values["var"],
        weight=values.get("gamma"),
        eps=float(config["epsilon"]),
        old_weight=float(config["momentum"]),
        steps=steps if trainable else None,  # a frozen one is in inference mode
        updates=trainable,
        trainable=trainable,
    )


def _node(layer: Layer) -> Node:
    kind = "other"
    if layer.kind == "BatchNormalization":
        kind = "normalizer"
    elif _WEIGHTS.fullmatch(layer.kind) and layer.config.get("activation") in (None, "linear"):
        kind = "weights"
    elif _DROPOUTS.fullmatch(layer.kind) and layer.config.get("rate", 0) > 0:
        kind = "dropout"
    has_bias = bool(layer.config.get("use_bias", False))
    return Node(name=layer.name, kind=kind, inputs=layer.inputs, has_bias=has_bias)
