"""A hundred pictures a class: does it help to start from a run on five other classes?

    python scripts/few_pictures.py --seeds 8

For each seed, a source is trained on folders with all pictures of five CIFAR-10 classes, and three
networks on folders with 100 pictures of each of the other five: fresh from the seed, from the
source with all weights learning on, and from the source with its body frozen. The settings of each
are chosen first, with other seeds, by pictures of the training set that are in neither folder; only
then are the test pictures looked at.

One JSON a run in docs/results/few-pictures/; what has its file is not run again.
"""

import argparse
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import normlab
from normlab.core.files import write_json
from normlab.core.records import read_json
from normlab.runs import Run
from normlab.statistics import Contrast, judge

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "few-pictures"
THEIRS = ("airplane", "automobile", "bird", "cat", "deer")
OURS = ("dog", "frog", "horse", "ship", "truck")
PICTURES, HELD_OUT = 100, 500  # a class
SOURCE_EPOCHS = 2
FIXED: dict[str, Any] = {"batch_size": 50, "shift": 2, "half_size": 0.0, "validation": 0.0}
TUNING_SEEDS = (100, 101)  # the scores' seeds count from 0
GRID: dict[str, dict[str, list[Any]]] = {
    "fresh": {"epochs": [20, 40], "learning_rate": [0.05, 0.15]},
    "learning on": {"epochs": [10, 20], "learning_rate": [0.05, 0.15], "statistics": ["adapt"]},
    "frozen": {
        "epochs": [20],
        "sgd_rate": [0.37, 1.0],
        "statistics": ["keep", "recalibrate"],
        "freeze": [True],
    },
}


def write_pictures(folder: Path, images: NDArray[np.uint8]) -> None:
    """Write pictures as PNGs, unless they are there."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}")
    unfinished.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(unfinished / f"{number:04d}.png", compress_level=1)
    unfinished.rename(folder)


def link_tree(folder: Path, parts: dict[str, Path]) -> Path:
    """Make `folder` of links, `train/dog` to a folder of pictures and so on."""
    for name, target in parts.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target.absolute())
    return folder


class Bench:
    """Where the pictures and the sources lie, and how a run is made."""

    def __init__(self, scratch: Path, threads: int) -> None:
        self.scratch, self.threads = scratch, threads
        self.cifar = normlab.load()
        os.environ["NORMLAB_CACHE"] = str(scratch / "cache")  # of the decoded folders

    def pictures(self, part: str, name: str, numbers: NDArray[np.int64] | None, tag: str) -> Path:
        """A folder of the pictures of class `name`, all or those with these numbers."""
        folder = self.scratch / "pictures" / part / tag / name
        x, y = getattr(self.cifar, f"x_{part}"), getattr(self.cifar, f"y_{part}")
        images = x[np.flatnonzero(y == self.cifar.class_names.index(name))]
        write_pictures(folder, images if numbers is None else images[numbers])
        return folder

    def few(self, seed: int, *, tuning: bool) -> Path:
        """100 pictures a class to train on; to score, held-out training or all test pictures."""
        parts = {}
        for name in OURS:
            order = np.random.default_rng([seed, OURS.index(name)]).permutation(5_000)
            chosen, held_out = order[:PICTURES], order[PICTURES : PICTURES + HELD_OUT]
            parts[f"train/{name}"] = self.pictures("train", name, chosen, f"few-{seed}")
            parts[f"test/{name}"] = (
                self.pictures("train", name, held_out, f"held-out-{seed}")
                if tuning
                else self.pictures("test", name, None, "all")
            )
        return link_tree(self.scratch / "data" / f"few-{seed}", parts)

    def source(self, seed: int) -> Run:
        """The run on the other five classes."""
        out = self.scratch / "sources" / f"seed-{seed}"
        if not (out / "result.json").exists():
            parts = {
                f"{part}/{name}": self.pictures(part, name, None, "all")
                for part, name in itertools.product(("train", "test"), THEIRS)
            }
            data = link_tree(self.scratch / "data" / "theirs", parts)
            begun = (out / "environment.json").exists()
            options: dict[str, Any] = {"out": out, "seed": seed, "threads": self.threads}
            if begun:
                normlab.resume(out)
            else:
                normlab.train("fast79", epochs=SOURCE_EPOCHS, data=data, **options)
        return normlab.open_run(out)

    def run(self, arm: str, seed: int, settings: dict[str, Any], *, tuning: bool) -> dict[str, Any]:
        """Train one network; what is kept of it."""
        start = None if arm == "fresh" else self.source(seed)
        data = self.few(seed, tuning=tuning)
        with tempfile.TemporaryDirectory(dir=self.scratch) as out:
            options: dict[str, Any] = {"out": out, "seed": seed, "threads": self.threads}
            run = normlab.train("fast79", data=data, start=start, **FIXED, **settings, **options)
            result, environment = run.result or {}, run.environment
        return {
            "arm": arm,
            "seed": seed,
            "settings": settings,
            "scored_on": "held-out training pictures" if tuning else "test pictures",
            "accuracy": result["test_accuracy"],
            "loss": result["test_loss"],
            "train_seconds": result["train_seconds"],
            "logistic_regression": result["baselines"]["logistic regression"]["test_accuracy"],
            "source_accuracy": start and (start.result or {})["test_accuracy"],
            "weights_sha256": result["weights_sha256"],
            "environment": environment,
        }


def kept(bench: Bench, path: Path, *run: Any, **how: Any) -> dict[str, Any]:
    """The run in the file `path`, done first if there is none."""
    if not path.exists():
        write_json(path, bench.run(*run, **how))
    return read_json(path)


def choose(bench: Bench, arm: str) -> dict[str, Any]:
    """The settings with the highest mean accuracy over the tuning seeds."""
    folder, best = RESULTS / "tuning", (-1.0, {})
    folder.mkdir(parents=True, exist_ok=True)
    for values in itertools.product(*GRID[arm].values()):
        settings = dict(zip(GRID[arm], values, strict=True))
        words = "-".join(map(str, values)).lower()
        scores = [
            kept(bench, folder / f"{arm}-{words}-seed-{s}.json".replace(" ", "-"), arm, s, settings,
                 tuning=True)["accuracy"]
            for s in TUNING_SEEDS
        ]  # fmt: skip
        mean = float(np.mean(scores))
        print(f"{arm} {settings}: {mean:.4f} on held-out training pictures", flush=True)
        best = max(best, (mean, settings), key=lambda pair: pair[0])
    return best[1]


def table(scores: dict[str, list[dict[str, Any]]], settings: dict[str, dict[str, Any]]) -> str:
    """Scores of the arms and their paired differences, as Markdown."""
    lines = [
        "| start | settings | accuracy, mean ± s.d. | lowest to highest |",
        "|---|---|---|---|",
    ]
    accuracy = {arm: np.array([run["accuracy"] for run in runs]) for arm, runs in scores.items()}
    for arm, a in accuracy.items():
        chosen = ", ".join(f"{k} {v}" for k, v in settings[arm].items())
        lines.append(
            f"| {arm} | {chosen} | {a.mean():.4f} ± {a.std(ddof=1):.4f} | {a.min():.4f} to "
            f"{a.max():.4f} |"
        )
    contrasts = [
        Contrast(first, other, accuracy[first] - accuracy[other])
        for first, other in (
            ("learning on", "fresh"), ("frozen", "fresh"), ("learning on", "frozen")
        )
    ]  # fmt: skip
    lines += ["", "| difference | mean | interval | p, Holm | verdict |", "|---|---|---|---|---|"]
    for c in judge(contrasts, look=1, generator=np.random.default_rng(0)):
        low, high = c.interval
        lines.append(
            f"| {c.first} − {c.other} | {c.difference:+.4f} | {low:+.4f} to {high:+.4f} "
            f"({1 - c.level:.1%}) | {c.p_value:.4f} | {c.verdict.replace('_', ' ')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where pictures and sources are kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments.scratch or Path(temporary), arguments.threads)
        settings = {arm: choose(bench, arm) for arm in GRID}
        scores: dict[str, list[dict[str, Any]]] = {arm: [] for arm in GRID}
        for seed, arm in itertools.product(range(arguments.seeds), GRID):
            path = RESULTS / f"{arm.replace(' ', '-')}-seed-{seed}.json"
            scores[arm].append(kept(bench, path, arm, seed, settings[arm], tuning=False))
            print(f"seed {seed}, {arm}: {scores[arm][-1]['accuracy']:.4f}", flush=True)
    write_json(RESULTS / "settings.json", {**FIXED, "chosen": settings})
    print(f"\n{table(scores, settings)}")


if __name__ == "__main__":
    main()
