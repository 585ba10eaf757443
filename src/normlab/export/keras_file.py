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
from normlab.export.certificate import Certificate, Check
from normlab.fit import predict_logits
from normlab.keras_layout import SNAKE_CASE, WEIGHTS, notebook_layers
from normlab.keras_reader import read_notebook
from normlab.models import NotebookNet
from normlab.runs import Run

# The oldest Keras that reads what is written here.
KERAS_VERSION = "3.0.0"


def certified(
    run: Run, model: nn.Module, images: NDArray[np.uint8], check: Check
) -> tuple[bytes, Certificate]:
    """The file's content and its certificate.

    Raises:
        UserError: a network that has no Keras form here.
    """
    if not isinstance(model, NotebookNet):
        raise UserError(
            f"network {type(model).__name__} cannot be written as Keras, only NotebookNet can: "
            "use --format onnx"
        )
    if model.norm_first:
        raise UserError(
            "norm_position=before cannot be written as Keras, only after can: use --format onnx"
        )
    norm, size, names = run.task.recipe.norm, run.task.image_size, run.task.class_names
    config, weights = _config(norm, size, len(names)), _weights(model, norm, size, len(names))
    metadata: dict[str, Any] = {"keras_version": KERAS_VERSION, "class_names": names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        path.write_bytes(_zipped(metadata, config, weights))
        if find_spec("keras") is None:
            again = NotebookNet(num_classes=len(names), image_size=size, norm=norm)
            found = read_notebook(path, size, len(names)).state
            state = {name: torch.from_numpy(values) for name, values in found.items()}
            again.load_state_dict(state, strict=False)
            answers = predict_logits(again, images).double().softmax(1).numpy()
            certificate = check(answers, "normlab's own reader, Keras not being installed")
        else:
            certificate = check(*_keras_answers(path, images))
    metadata |= {"certificate": certificate.as_dict(), "recipe": run.task.as_dict()}
    return _zipped(metadata, config, weights), certificate


def _keras_answers(path: Path, images: NDArray[np.uint8]) -> tuple[NDArray[np.floating], str]:
    os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras' own default may not be installed
    import keras

    model = keras.models.load_model(path, compile=False)
    answers = model.predict(np.asarray(images), batch_size=250, verbose=0)
    return answers, f"Keras {version('keras')} on {keras.backend.backend()}"


def _config(norm: str, image_size: int, num_classes: int) -> dict[str, Any]:
    """The model as Keras describes it: a `Sequential` of registered layers."""
    shape = [None, image_size, image_size, 3]
    layers = [
        _layer("InputLayer", {"batch_shape": shape, "dtype": "uint8", "name": "images"}),
        _layer("Rescaling", {"scale": 1 / 255, "offset": 0.0, "name": "scaling"}),
    ]
    dropouts = {"conv1": "dropout", "flatten": "dropout_1", "hidden": "dropout_2"}
    for layer in notebook_layers(norm, image_size, num_classes):
        config = {**layer.config, "name": layer.name}
        if layer.kind == "BatchNormalization":
            config["momentum"] = 0.99
        layers.append(_layer(layer.kind, config))
        if layer.name in dropouts:
            layers.append(_layer("Dropout", {"rate": 0.2, "name": dropouts[layer.name]}))
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {"name": "notebook", "layers": layers, "build_input_shape": shape},
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


def _weights(model: NotebookNet, norm: str, image_size: int, num_classes: int) -> bytes:
    state, used = model.state_dict(), Counter[str]()
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for layer in notebook_layers(norm, image_size, num_classes):
            if layer.kind not in WEIGHTS:
                continue
            place = SNAKE_CASE[layer.kind]
            number = used[place]
            used[place] += 1
            folder = f"layers/{place}{f'_{number}' if number else ''}/vars"
            for i, key in enumerate(WEIGHTS[layer.kind]):
                array = state[f"{layer.name}.{key}"].cpu().numpy()
                if array.ndim == 4:
                    array = array.transpose(2, 3, 1, 0)  # (O, C, h, w) → (h, w, C, O)
                elif array.ndim == 2:
                    array = array.T
                f.create_dataset(f"{folder}/{i}", data=np.ascontiguousarray(array))
    return buffer.getvalue()


def _zipped(metadata: dict[str, Any], config: dict[str, Any], weights: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        # ZipInfo's fixed date makes equal models equal files.
        z.writestr(zipfile.ZipInfo("metadata.json"), json.dumps(metadata))
        z.writestr(zipfile.ZipInfo("config.json"), json.dumps(config))
        z.writestr(zipfile.ZipInfo("model.weights.h5"), weights)
    return buffer.getvalue()
