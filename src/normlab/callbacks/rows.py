"""`history.jsonl` of a training that is not ours: the rows that `normlab train` writes."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normlab.core.files import write_atomic

HISTORY = "history.jsonl"


class Rows:
    """A history that grows by a row an epoch, and is whole at any time.

    Args:
        folder: made if it is not there; a history that is in it is begun anew.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / HISTORY
        self.rows: list[dict[str, Any]] = []
        self.began = time.perf_counter()

    def add(self, epoch: int, steps: int, logs: Mapping[str, Any]) -> None:
        """Write one more row.

        Args:
            epoch: from 1.
            steps: so far.
            logs: what the framework tells of the epoch, by its own names; `loss`, `accuracy`,
                `val_loss` and `val_accuracy` get these names, the others stay.
        """
        found = {_ours(name): _number(value) for name, value in logs.items()}
        names = ("loss", "accuracy", "val_loss", "val_accuracy")
        row = {"epoch": epoch, "steps": steps, **{name: found.pop(name, None) for name in names}}
        self.rows.append({**row, "seconds": time.perf_counter() - self.began, **found})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in self.rows]
        write_atomic(self.path, "".join(lines).encode())


def _ours(name: str) -> str:
    """What our rows call it: `train_loss_epoch` is `loss`, `val_acc` is `val_accuracy`."""
    plain = name.replace("/", "_").removesuffix("_epoch").removeprefix("train_")
    plain = plain.replace("valid_", "val_").replace("validation_", "val_")
    for other in ("sparse_categorical_accuracy", "categorical_accuracy", "binary_accuracy", "acc"):
        if plain in (other, f"val_{other}"):
            return plain.replace(other, "accuracy")
    return plain


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
