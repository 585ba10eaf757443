"""A `.keras` file: the network as it was trained, normalisations and all, so that Keras can go on.

The file is a zip of `metadata.json`, `config.json` and `model.weights.h5`; it is written without
Keras and checked by Keras where that is installed.
"""

import io
import json
import os
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from normlab.errors import UserError
from normlab.evaluation.doubt import Doubt
from normlab.evaluation.forward import logits_of
from normlab.evaluation.held_out import Features
from normlab.formats.keras_layout import EPSILON, SNAKE_CASE
from normlab.formats.keras_notebook import read_notebook
from normlab.interchange.certificate import Certificate, Check
from normlab.interchange.keras_layers import KerasLayer, layers_of
from normlab.models import NotebookNet
from normlab.runs import Run

# The oldest Keras that reads what is written here.
KERAS_VERSION = "3.0.0"


def certified(
    run: Run,
    model: nn.Module,
    images: NDArray[np.uint8],
    check: Check,
    learnt: tuple[Doubt, Features | None] | None = None,
) -> tuple[bytes, Certificate]:
    """The file's content and its certificate.

    The temperature of `learnt` is in the last layer's weights, and all it knows in the metadata.

    Raises:
        UserError: a network that has no Keras form here, or one that only Keras can check where
            Keras is missing.
    """
    name, size = run.task.recipe.model.name, run.task.image_size
    layers = layers_of(model, size)
    metadata: dict[str, Any] = {"class_names": run.task.class_names}
    if learnt is not None:
        doubt, _ = learnt
        last = layers[-1]
        cooled = [(array / doubt.temperature).astype(np.float32) for array in last.weights]
        layers[-1] = replace(last, weights=cooled)
        metadata["doubt"] = doubt.as_dict()
    content = model_file(name, layers, size, metadata)
    if find_spec("keras") is not None:
        certificate = check(*keras_answers(content, images))
    elif isinstance(model, NotebookNet) and run.task.recipe.norm.epsilon == EPSILON:
        certificate = check(*_our_answers(content, run, images))
    else:
        raise UserError(
            f"a {name} network in Keras' format is checked by Keras, which is not installed: "
            "pip install keras"
        )
    metadata |= {"certificate": certificate.as_dict(), "recipe": run.task.published()}
    return model_file(name, layers, size, metadata), certificate


def model_file(
    name: str, layers: list[KerasLayer], image_size: int, metadata: dict[str, Any]
) -> bytes:
    """The content of the `.keras` file of a `Sequential` model `name`."""
    metadata = {"keras_version": KERAS_VERSION, **metadata}
    return _zipped(metadata, _config(name, layers, image_size), _weights(layers))


def keras_answers(content: bytes, images: NDArray[np.uint8]) -> tuple[NDArray[np.floating], str]:
    """Probabilities (N, K) that Keras gives with a file of this content, and which Keras."""
    os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras' own default may not be installed
    import keras

    with _written(content) as path:
        model = keras.models.load_model(path, compile=False)
    answers = model.predict(np.asarray(images), batch_size=250, verbose=0)
    return answers, f"Keras {version('keras')} on {keras.backend.backend()}"


def _our_answers(
    content: bytes, run: Run, images: NDArray[np.uint8]
) -> tuple[NDArray[np.floating], str]:
    size, classes = run.task.image_size, len(run.task.class_names)
    with _written(content) as path:
        found = read_notebook(path, size, classes)
    model = NotebookNet(num_classes=classes, image_size=size, norm=found.norm)
    state = {name: torch.from_numpy(values) for name, values in found.state.items()}
    model.load_state_dict(state, strict=False)
    answers = logits_of(model, images).double().softmax(1).numpy()
    return answers, "normlab's own reader, Keras not being installed"


@contextmanager
def _written(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        path.write_bytes(content)
        yield path


def _config(name: str, layers: list[KerasLayer], image_size: int) -> dict[str, Any]:
    """The model as Keras describes it: a `Sequential` of registered layers."""
    shape = [None, image_size, image_size, 3]
    first = _layer("InputLayer", {"batch_shape": shape, "dtype": "uint8", "name": "images"})
    described = [first, *(_layer(layer.kind, layer.config) for layer in layers)]
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {"name": name, "layers": described, "build_input_shape": shape},
        "registered_name": None,
        "build_config": {"input_shape": shape},
    }


def _layer(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "module": "keras.layers",
        "class_name": kind,
        "config": config,
        "registered_name": None,
    }


def _weights(layers: list[KerasLayer]) -> bytes:
    used = Counter[str]()
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for layer in layers:
            if not layer.weights:
                continue
            place = SNAKE_CASE[layer.kind]
            number = used[place]
            used[place] += 1
            folder = f"layers/{place}{f'_{number}' if number else ''}/vars"
            for i, array in enumerate(layer.weights):
                f.create_dataset(f"{folder}/{i}", data=array)
    return buffer.getvalue()


def _zipped(metadata: dict[str, Any], config: dict[str, Any], weights: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        # ZipInfo's fixed date makes equal models equal files.
        z.writestr(zipfile.ZipInfo("metadata.json"), json.dumps(metadata))
        z.writestr(zipfile.ZipInfo("config.json"), json.dumps(config))
        z.writestr(zipfile.ZipInfo("model.weights.h5"), weights)
    return buffer.getvalue()
