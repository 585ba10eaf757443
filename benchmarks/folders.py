"""People's own folders of pictures: the default training beside simple answers, for the same work.

    python -m benchmarks.folders FOLDER… --seeds 3
    python -m benchmarks.folders --table

For each folder and seed one line each in docs/results/pictures.jsonl; what stands there is not done
again, as long as the default's settings are the same. The four ways see the same split:

    default     normlab train --data FOLDER, no option
    cnn         a plain network in PyTorch, 64 × 64, Adam, for as many CPU seconds; mirrored where
                the default mirrors
    boosting    scikit-learn's histogram gradient boosting on 16 × 16 pixels
    regression  logistic regression on 8 × 8 or 16 × 16 pixels, whichever cross-validates better

Everything runs on one thread and is counted in seconds of the processor, not of the clock, so that
other work on the machine does not matter. The three need scikit-learn.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import normlab
from normlab.core.environment import describe_machine
from normlab.data import ImageData
from normlab.evaluation import metrics
from normlab.recipes import get
from normlab.recipes.pictures import fitted
from normlab.training.state import Plan, State

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "pictures.jsonl"
WAYS = ("default", "cnn", "boosting", "regression")
MOST_CLASSES = 50  # of boosting, whose trees are a class's: 100 classes take half an hour


class Processor:
    """Observes a training: seconds of the processor from before its first step to its last."""

    seconds = 0.0

    def before_training(self, plan: Plan) -> None:
        self.started = time.process_time()

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        self.seconds = time.process_time() - self.started


def train_default(folder: str, seed: int) -> dict[str, Any]:
    """What `normlab train --data FOLDER` gives."""
    used = Processor()
    with tempfile.TemporaryDirectory() as scratch:
        run = normlab.train(
            data=folder, out=scratch, seed=seed, threads=1, skip_bad=True, observers=(used,)
        )
        result = run.finished()
    return {
        "test_accuracy": result["test_accuracy"],
        "balanced_accuracy": result["evaluation"]["balanced_accuracy"],
        "test_images": result["evaluation"]["test_images"],
        "steps": result["steps"],
        "image_size": run.task.image_size,
        "model": run.task.recipe.model.name,
        "weights": result["weights"],
        "cpu_seconds": used.seconds,
    }


def train_cnn(images: ImageData, seed: int, seconds: float) -> dict[str, Any]:
    """Four blocks of convolution, batch normalisation, ReLU and pooling, trained for the time."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 32), (32, 64), (64, 128), (128, 256)):
        convolution = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, images.num_classes)]
    network = nn.Sequential(*layers, *head)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    mean = images.x_train.mean((0, 1, 2), dtype=np.float64) / 255
    std = images.x_train.std((0, 1, 2), dtype=np.float64) / 255 + 1e-6
    labels = torch.from_numpy(images.y_train.astype(np.int64))

    def inputs(pixels: NDArray[np.uint8]) -> torch.Tensor:
        scaled = (pixels / 255 - mean) / std
        return torch.from_numpy(scaled.astype(np.float32)).permute(0, 3, 1, 2)

    mirror = "augment" not in fitted(images.class_names, 64, (), from_run=False)
    started, steps, count = time.process_time(), 0, len(labels)
    while time.process_time() - started < seconds:
        order = rng.permutation(count)
        for a in range(0, count - 1, 32):
            chosen = order[a : a + 32]
            x = inputs(images.x_train[chosen])
            mirrored = torch.from_numpy(rng.random(len(chosen)) < (0.5 if mirror else 0))
            x[mirrored] = x[mirrored].flip(3)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), labels[chosen]).backward()
            optimizer.step()
            steps += 1
            if time.process_time() - started >= seconds:
                break
    used = time.process_time() - started
    network.eval()
    with torch.no_grad():
        parts = range(0, len(images.x_test), 250)
        answers = [network(inputs(images.x_test[a : a + 250])).argmax(1).numpy() for a in parts]
    epochs = steps * 32 / count
    return scores(images, np.concatenate(answers)) | {"cpu_seconds": used, "epochs": epochs}


def fit_boosting(images: ImageData, seed: int) -> dict[str, Any]:
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(random_state=seed)
    started = time.process_time()
    model.fit(features(images.x_train, 16), images.y_train)
    used = time.process_time() - started
    answers = model.predict(features(images.x_test, 16))
    return scores(images, answers) | {"cpu_seconds": used}


def fit_regression(images: ImageData, seed: int) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    started = time.process_time()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    folds = StratifiedKFold(3, shuffle=True, random_state=seed)
    found = {
        side: cross_val_score(model, features(images.x_train, side), images.y_train, cv=folds)
        for side in (8, 16)
    }
    side = max(found, key=lambda s: float(found[s].mean()))
    model.fit(features(images.x_train, side), images.y_train)
    answers = model.predict(features(images.x_test, side))
    used = time.process_time() - started
    return scores(images, answers) | {"cpu_seconds": used, "image_size": side}


def features(pictures: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """(N, H, W, 3) → (N, side·side·3), each the mean of an area."""
    small = [Image.fromarray(p).resize((side, side), Image.Resampling.BOX) for p in pictures]
    return np.stack([np.asarray(p) for p in small]).reshape(len(pictures), -1) / 255


def scores(images: ImageData, answers: NDArray[np.integer]) -> dict[str, Any]:
    confusion = metrics.confusion_matrix(
        images.y_test.astype(np.int64), answers, images.num_classes
    )
    return {
        "test_accuracy": metrics.accuracy(confusion),
        "balanced_accuracy": metrics.balanced_accuracy(confusion),
        "test_images": len(images.y_test),
    }


def settings_of_default() -> str:
    """Which default a line is about: another has another fingerprint."""
    settings = json.dumps(get("pictures").settings(), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def read() -> list[dict[str, Any]]:
    """The lines of this command."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [row for row in map(json.loads, lines) if "default" in row]


def one(folder: str, way: str, seed: int, done: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """One way on one folder; None where it is left out."""
    if way == "default":
        return train_default(folder, seed)
    images = normlab.load(folder, image_size=64, skip_bad=True)
    if way == "cnn":
        return train_cnn(images, seed, done["default"]["cpu_seconds"])
    if way == "boosting":
        return fit_boosting(images, seed) if images.num_classes <= MOST_CLASSES else None
    return fit_regression(images, seed)


def work(folders: list[str], seeds: int, ways: list[str]) -> Iterator[dict[str, Any]]:
    """Do and keep what is missing, seed by seed, so that a stop leaves whole rows."""
    fingerprint = settings_of_default()
    for seed in range(seeds):
        for folder in folders:
            name = Path(folder).name
            done = {
                row["way"]: row
                for row in read()
                if (row["set"], row["seed"]) == (name, seed)
                and (row["way"] in ("boosting", "regression") or row["default"] == fingerprint)
            }
            for way in [w for w in ways if w not in done]:
                if way == "cnn" and "default" not in done:
                    continue
                found = one(folder, way, seed, done)
                if found is None:
                    continue
                machine = describe_machine(1, torch.device("cpu"))
                kept = {key: machine[key] for key in ("normlab", "torch", "cpu", "threads")}
                row = {"set": name, "way": way, "seed": seed, "default": fingerprint, **found}
                done[way] = row | kept
                with RESULTS.open("a", encoding="utf-8") as f:
                    f.write(json.dumps(done[way]) + "\n")
                yield done[way]


def table(say: Callable[[str], None] = print) -> None:
    """Mean ± standard deviation over the seeds, and how many there are."""
    fingerprint = settings_of_default()
    found: dict[str, dict[str, list[float]]] = {}
    for row in read():
        if row["way"] in ("boosting", "regression") or row["default"] == fingerprint:
            ways = found.setdefault(row["set"], {})
            ways.setdefault(row["way"], []).append(row["test_accuracy"])
    say(f"| folder | {' | '.join(WAYS)} | seeds |\n|---|{'---|' * (len(WAYS) + 1)}")
    for name, ways in found.items():
        cells = [cell(ways.get(way, [])) for way in WAYS]
        say(f"| {name} | {' | '.join(cells)} | {len(ways.get('default', []))} |")


def cell(values: list[float]) -> str:
    """
    >>> cell([0.5, 0.52]), cell([0.5]), cell([])
    ('0.510 ± 0.014', '0.500', '–')
    """
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--table", action="store_true", help="print what there is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for row in work(arguments.folders, arguments.seeds, arguments.ways):
        print(
            f"{row['set']}, {row['way']}, seed {row['seed']}: {row['test_accuracy']:.4f} "
            f"in {row['cpu_seconds']:.0f} s of the processor",
            flush=True,
        )
    if arguments.table or not arguments.folders:
        table()


if __name__ == "__main__":
    main()
