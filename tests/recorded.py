"""Two tiny recorded runs, with and without batch normalisation, made without training a network."""

from pathlib import Path

import numpy as np
import torch

from normlab import recipes
from normlab.core.files import write_json
from normlab.core.streams import stream
from normlab.inspection import activations
from normlab.inspection.recording import RECORDING, Recording
from normlab.models import SigmoidNet
from normlab.runs import Run, Task, open_run

STEPS = (1, 2, 5, 20, 60)


def write_run(folder: Path, norm: str, model: torch.nn.Module | None = None) -> Run:
    """A finished run whose samples are real probes of a network that drifts away."""
    folder.mkdir()
    recipe = recipes.get("paper-sigmoid").override(norm=norm)
    task = Task(
        recipe=recipe,
        seed=0,
        data="sample",
        data_sha256="0",
        class_names=tuple("0123456789"),
        image_size=32,
    )
    write_json(folder / "recipe.json", task.as_dict())
    write_json(
        folder / "result.json",
        {"train_seconds": 10.0, "test_accuracy": 0.1, "test_accuracy_interval": [0.0, 0.2]},
    )
    model = model or SigmoidNet(image_size=32, norm=norm)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.random((20, 3, 32, 32), np.float32))
    labels = torch.from_numpy(rng.integers(0, 10, 20))
    recording = Recording(np.empty(0, np.int64), tuple(activations.observed(model)), {})
    for step in STEPS:
        sample = activations.probe(model, x, labels, stream(0))
        for layer in recording.layers:
            for side in ("in", "out"):
                sample[f"{layer}/{side}/drift"] = np.asarray(0.1 / step, np.float32)
            if f"{layer}/weight_norm" in sample:
                sample[f"{layer}/effective_rate"] = np.asarray(0.01, np.float32)
        sample["seconds"] = np.asarray(0.1, np.float32)
        recording = recording.append(step, sample)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1).add_(0.01)
    recording.write(folder / RECORDING, compress=True)
    return open_run(folder)
