"""What every recipe scored over its seeds, from what `benchmarks.headline` kept."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.summary import processor, table
from normlab.recipes import RECIPES

Run = dict[str, Any]


def kept(results: Path) -> dict[str, list[Run]]:
    """The runs in `results/headline`, by the name of their folder."""
    found: dict[str, list[Run]] = {}
    for path in sorted((results / "headline").glob("*/seed-*.json")):
        found.setdefault(path.parent.name, []).append(json.loads(path.read_text(encoding="utf-8")))
    return found


def timed(runs: list[Run], key: str = "train_seconds") -> list[float]:
    """Seconds (of training, unless told) of those that had every core of a quiet machine."""
    return [
        run[key]
        for run in runs
        if run["quiet"] and run["environment"]["threads"] == run["environment"]["cores"]
    ]


def recipe_table(results: Path) -> str:
    """A row for each recipe as it is now, on each processor, and one for each variant."""
    runs = kept(results)
    now = {name: r for name, r in runs.items() if name.removesuffix("-zen4") in RECIPES}
    other = {name: r for name, r in runs.items() if name not in now}
    return f"{_table(now)}\n\nVariants, and the recipes as they were:\n\n{_table(other)}"


def _table(found: dict[str, list[Run]]) -> str:
    rows = []
    for name, runs in found.items():
        scores = [run["test_accuracy"] for run in runs]
        mirrored = statistics.mean(run["test_accuracy_flip"] for run in runs)
        six = f"{statistics.mean(run['test_accuracy_shift'] for run in runs):.4f}"
        if looked := timed(runs, "shift_seconds"):
            six += f" in {statistics.median(looked):.1f}"
        took = timed(runs)
        spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
        seconds = (
            f"{statistics.median(took):.1f} ({min(took):.1f} to {max(took):.1f}, n = {len(took)})"
            if took
            else "not timed"
        )
        rows.append(
            [
                f"`{name}`",
                str(len(scores)),
                f"{statistics.mean(scores):.4f}{spread}",
                f"{min(scores):.4f} to {max(scores):.4f}",
                f"{mirrored:.4f}",
                six,
                seconds,
                ", ".join(sorted({processor(run["environment"]) for run in runs})),
            ]
        )
    head = ["", "seeds", "test accuracy", "range", "mirrored too", "six views, seconds"]
    head += ["training, seconds", "on"]
    return table(head, rows)
