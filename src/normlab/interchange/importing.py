"""Bring the notebook's network, trained with Keras, in as an ordinary run."""

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from normlab.core.environment import describe_machine, resolve_device, resolve_threads
from normlab.core.files import write_json
from normlab.core.sandbox import LimitError, limited
from normlab.core.tensors import digest, write_tensors
from normlab.data import load
from normlab.data.loading import check_size
from normlab.errors import DataError, UserError, install
from normlab.evaluation.evaluation import evaluate
from normlab.recipes.notebook import notebook
from normlab.runs import Run, Task, create_folder

SECONDS = 30.0  # that reading the file may take


def import_model(
    model: str | Path,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    image_size: int | None = None,
    skip_bad: bool = False,
) -> Run:
    """Make a run of the Keras file `model` and score it once on the test images of `data`.

    Args:
        model: a `.keras` or `.h5` file with the notebook's network, with batch normalisation or
            without; a `Rescaling` by 1/255 before it is known, too.
        out: the run's folder, new or empty; None for the next number in `runs/`.
        data, image_size, skip_bad: what it was trained on, as `normlab.data.load` takes them; None
            for CIFAR-10 and 32 pixels.

    Raises:
        UserError: h5py is missing, or the folder is not empty.
        DataError: the file holds another network, or none.
    """
    try:
        from normlab.formats.keras_notebook import read_notebook
    except ImportError:
        raise UserError(f"import needs the package h5py: {install('keras')}") from None
    started = time.perf_counter()
    images = load(data, image_size=image_size or 32, skip_bad=skip_bad)
    check_size(images.name, images.image_shape, image_size)
    data_seconds = time.perf_counter() - started
    height, width, _ = images.image_shape
    if height != width:
        raise DataError(f"data {images.name!r} has images of {height} × {width}: make them square")
    path = Path(model)
    memory = (1 << 30) + 16 * (path.stat().st_size if path.exists() else 0)
    try:
        found = limited(
            read_notebook, path, height, len(images.class_names), memory=memory, seconds=SECONDS
        )
    except LimitError as e:
        raise LimitError(f"{path}: {e}") from None
    task = Task(
        recipe=replace(notebook().override(norm=found.norm), name="imported"),
        seed=0,
        data=images.name if data is None else str(data),
        data_sha256=images.sha256,
        class_names=images.class_names,
        image_size=height,
        skip_bad=skip_bad,
    )
    network = task.build()
    state = {name: torch.from_numpy(values) for name, values in found.state.items()}
    network.load_state_dict(state, strict=False)  # Keras counts no batches
    folder = create_folder(out, "imported")
    write_json(folder / "recipe.json", task.as_dict())
    write_json(
        folder / "environment.json", describe_machine(resolve_threads(None), resolve_device("cpu"))
    )
    write_tensors(folder / "last.safetensors", network.state_dict())
    run = Run(folder, task)
    started = time.perf_counter()
    evaluation = evaluate(run, images)
    result: dict[str, Any] = {
        "run": str(folder),
        "recipe": task.recipe.name,
        "norm": found.norm,
        "seed": task.seed,
        "imported_from": {"file": path.name, "sha256": _sha256(path)},
        "steps": 0,
        "test_accuracy": evaluation.accuracy,
        "test_accuracy_interval": list(evaluation.interval),
        "test_loss": evaluation.loss,
        "val_accuracy": None,
        "val_loss": None,
        "train_seconds": 0.0,
        "images_per_second": 0.0,
        "weights_sha256": digest(network.state_dict()),
        "data_seconds": data_seconds,
        "evaluation_seconds": time.perf_counter() - started,
        "evaluation": evaluation.as_dict(),
    }
    write_json(folder / "result.json", result)
    return run


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
