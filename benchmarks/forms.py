"""How long the forms of one model take to answer: the run, its ONNX files, its Keras file.

    python -m benchmarks.forms RUN FILE… [--rounds 15] [--out RESULT.json]

FILE is what `normlab export` wrote: .onnx, in float32 or eight bits, or .keras. Each answers the
same pictures of the run's size, one at a time and in batches of 256, on one thread. The forms take
turns; medians and quartiles of the rounds are told.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.core.environment import describe_machine, resolve_device, settings
from normlab.core.streams import stream

BATCHES = {1: 50, 256: 1}  # and how many calls are one round
Answer = Callable[[NDArray[np.uint8]], object]


def of_run(folder: Path) -> Answer:
    from normlab.evaluation.prediction import run_predictor
    from normlab.runs import open_run

    return run_predictor(open_run(folder)).answers


def of_onnx(file: Path) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    return lambda pictures: session.run(None, {"images": pictures})


def of_keras(file: Path) -> Answer:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    import torch

    model = keras.models.load_model(file)
    return lambda pictures: model(torch.from_numpy(pictures.astype(np.float32)), training=False)


def measure(forms: dict[str, Answer], size: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds a call, of each form and batch: median and quartiles of the rounds."""
    import torch

    found: dict[tuple[str, int], list[float]] = {}
    rng = stream(0, "forms")
    with settings(1, resolve_device("cpu")), torch.no_grad():
        for batch, calls in BATCHES.items():
            pictures = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
            for turn in range(rounds + 1):
                for name, answer in forms.items():
                    started = time.perf_counter()
                    for _ in range(calls):
                        answer(pictures)
                    took = 1000 * (time.perf_counter() - started) / calls
                    if turn:  # the first one warms up
                        found.setdefault((name, batch), []).append(took)
    return [
        {"form": name, "batch": batch, "milliseconds": np.percentile(took, [25, 50, 75]).tolist()}
        for (name, batch), took in found.items()
    ]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(words)
    from normlab.runs import open_run

    task = open_run(options.run).task
    forms = {"the run": of_run(options.run)}
    for file in options.files:
        make = {".onnx": of_onnx, ".keras": of_keras}[file.suffix]
        forms[f"{file.parent.name}/{file.name}"] = make(file)
    rows = measure(forms, task.image_size, options.rounds)
    print(f"| {task.recipe.name}, milliseconds a call | batch of 1 | batch of 256 |\n|---|---|---|")
    for name in forms:
        cells = [
            "{1:.3g} ({0:.3g} to {2:.3g})".format(*row["milliseconds"])
            for row in rows
            if row["form"] == name
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    if options.out is not None:
        record = {"recipe": task.recipe.name, "rounds": options.rounds, "forms": rows}
        record["machine"] = describe_machine(1, resolve_device("cpu"))
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
