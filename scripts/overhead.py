"""What recording and checkpoints cost, as shares of a training's processor time.

    python scripts/overhead.py fast79 --out docs/results/overhead/fast79.json
    python scripts/overhead.py notebook --epochs 1 --out docs/results/overhead/notebook.json

One thread, and processor time, since other programs disturb it less than the clock. Time of the
clock is noted, too, for what a checkpoint waits for the disk.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from normlab import recipes
from normlab.core.environment import describe_machine, settings
from normlab.data import load
from normlab.inspection.recording import Recorder
from normlab.runs import Task
from normlab.training import checkpoint
from normlab.training.loop import fit
from normlab.training.preparation import make_plan, new_state

SAVES = 5


class Timed:
    """An observer whose processor seconds are added up."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds = inner, 0.0

    def before_training(self, plan: Any) -> None:
        self.inner.before_training(plan)

    def after_step(self, *arguments: Any) -> None:
        began = time.process_time()
        self.inner.after_step(*arguments)
        self.seconds += time.process_time() - began


def measure(name: str, epochs: int | None, data: str) -> dict[str, Any]:
    """Train a recipe once; shares of the processor time that the training itself took."""
    images = load(data)
    task = Task(recipe=recipes.get(name).override(epochs=epochs), seed=0, data=images.name,
                data_sha256=images.sha256, class_names=images.class_names,
                image_size=images.image_shape[0])  # fmt: skip
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, settings(1, device):
        plan = make_plan(task, images, 1, Path(folder))
        state = new_state(task, images, device)
        recorder, kept = Timed(Recorder()), Timed(checkpoint.Checkpoints(Path(folder), state))
        began = time.process_time()
        fit(plan, state, device, (recorder, kept))
        total = time.process_time() - began - recorder.seconds - kept.seconds
        saves = []
        for _ in range(SAVES):
            began, clock = time.process_time(), time.perf_counter()
            checkpoint.save(Path(folder), state)
            saves.append((time.process_time() - began, time.perf_counter() - clock))
        size = (Path(folder) / checkpoint.CHECKPOINT).stat().st_size
    save, wait = (statistics.median(column) for column in zip(*saves, strict=True))
    return {
        "recipe": name,
        "steps": plan.steps,
        "training_cpu_seconds": round(total, 2),
        "recording_share": round(recorder.seconds / total, 4),
        "checkpoint_bytes": size,
        "checkpoint_cpu_seconds": round(save, 4),
        "checkpoint_clock_seconds": round(wait, 4),
        "checkpoint_share": round(wait / checkpoint.SECONDS_BETWEEN, 4),
        "environment": describe_machine(1, device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what recording and checkpoints cost.")
    parser.add_argument("recipe")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    found = measure(options.recipe, options.epochs, options.data)
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
