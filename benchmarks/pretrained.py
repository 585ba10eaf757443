"""What the batch normalisations of a pretrained network should do with new pictures, in pairs.

    python -m benchmarks.pretrained study FOLDER… --from NAME=FILE --out RESULTS.jsonl
    python -m benchmarks.pretrained table RESULTS.jsonl

Every arm starts from the same network with a head fitted to its features, and learns on for
`--epochs` at the recipe's low rate: with kept, adapting or recalibrated statistics, and with
adapting ones in smaller batches. Arms of one seed see the same pictures in the same order. A line a
run is added to RESULTS; runs that stand there already are left out, so it can be stopped at will.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import normlab
from normlab.core.environment import describe_machine
from normlab.data import load
from normlab.training.state import Plan, State

# Statistics and batch size; the first is what the others are compared with.
ARMS = (
    ("keep", 32),
    ("adapt", 32),
    ("recalibrate", 32),
    ("adapt", 8),
    ("adapt", 4),
    ("adapt", 2),
)


class Quiet:
    """An observer that says nothing."""

    def before_training(self, plan: Plan) -> None:
        pass

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        pass


def study(folders: list[str], args: argparse.Namespace) -> None:
    out, ends = Path(args.out), time.monotonic() + 60 * args.minutes
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(r["folder"], r["seed"], r["statistics"], r["batch_size"]) for r in rows}
    for seed in range(args.seeds):
        for folder in folders:
            images = load(folder, image_size=args.image_size)
            for statistics, batch_size in ARMS:
                if (Path(folder).name, seed, statistics, batch_size) in done:
                    continue
                if time.monotonic() > ends:
                    return
                row = trained(images, args, seed, statistics, batch_size)
                row = {"folder": Path(folder).name, **row}
                with out.open("a") as f:
                    f.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def trained(
    images: Any, args: argparse.Namespace, seed: int, statistics: str, batch_size: int
) -> dict[str, Any]:
    """One run's scores: of its head before it learnt on, of its last weights, of those kept."""
    with TemporaryDirectory() as folder:
        run = normlab.train(
            data=images,
            start=args.start,
            statistics=statistics,
            out=Path(folder) / "run",
            seed=seed,
            threads=args.threads,
            observers=(Quiet(),),
            settings={"epochs": args.epochs, "batch_size": batch_size},
        )
        result = run.finished()
        last = run.evaluate(images, weights="last")
        history = run.history
        machine = describe_machine(args.threads, torch.device("cpu"))
    return {
        "seed": seed,
        "statistics": statistics,
        "batch_size": batch_size,
        "epochs": args.epochs,
        "image_size": args.image_size,
        "training_images": len(images.x_train),
        "test_images": len(images.x_test),
        "test_accuracy": last.accuracy,
        "test_loss": last.loss,
        "kept": result["weights"],
        "kept_accuracy": result["test_accuracy"],
        "val_loss": [row["val_loss"] for row in history],
        "seconds": result["train_seconds"],
        **{key: machine[key] for key in ("cpu", "torch", "normlab", "threads")},
    }


def table(file: str) -> None:
    """The means of each arm, and its differences from the first one in pairs of a seed."""
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    arms: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for r in rows:
        arms[r["folder"], r["statistics"], r["batch_size"]][r["seed"]] = r["test_accuracy"]
    folders = list(dict.fromkeys(r["folder"] for r in rows))
    print("| statistics | batch | " + " | ".join(folders) + " |")
    print("|---|---|" + "---|" * len(folders))
    for statistics, batch_size in ARMS:
        cells = []
        for folder in folders:
            found = arms[folder, statistics, batch_size]
            first = arms[folder, *ARMS[0]]
            pairs = [100 * (found[s] - first[s]) for s in found if s in first]
            if not pairs:
                cells.append("–")
                continue
            spread = f" ± {np.std(pairs, ddof=1):.1f}" if len(pairs) > 1 else ""
            mean = np.mean(list(found.values()))
            cells.append(f"{mean:.3f} ({np.mean(pairs):+.1f}{spread}; n = {len(pairs)})")
        print(f"| {statistics} | {batch_size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("study")
    run.add_argument("folders", nargs="+")
    run.add_argument("--from", dest="start", required=True)
    run.add_argument("--out", required=True)
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--epochs", type=int, default=2)
    run.add_argument("--image-size", type=int, default=96)
    run.add_argument("--threads", type=int, default=1)
    run.add_argument("--minutes", type=float, default=9.0, help="No run begins after so many.")
    verbs.add_parser("table").add_argument("file")
    parsed = parser.parse_args()
    table(parsed.file) if parsed.verb == "table" else study(parsed.folders, parsed)
