"""A run's folder, opened, and the records in it."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import nn

from normlab.core.places import read_text
from normlab.core.records import as_object, checked, read_json
from normlab.core.tensors import read_tensors
from normlab.data import ImageData
from normlab.errors import DataError, UserError, nearest
from normlab.runs.folders import RUNS, latest
from normlab.runs.task import Task
from normlab.text import listed

WEIGHTS = ("kept", "last", "best", "recalibrated")


class Later(TypedDict):
    """With what a run went on behind `step`: how that differs, and all that `Environment` has."""

    step: int
    threads: int
    device: str
    differs: list[str]
    data_sha256: str
    code_sha256: NotRequired[str]


class Environment(TypedDict):
    """`environment.json`: versions, processor, threads, what is observed. It may have more keys."""

    threads: int
    device: str
    cpu: NotRequired[str]
    torch: NotRequired[str]
    normlab: NotRequired[str]
    code_sha256: NotRequired[str]
    record: NotRequired[bool | list[str]]
    three_way: NotRequired[bool]
    later: NotRequired[list[Later]]


class Row(TypedDict):
    """A line of `history.jsonl`. More keys may stand in it."""

    epoch: int
    steps: int
    val_accuracy: float | None
    loss: NotRequired[float | None]
    accuracy: NotRequired[float | None]
    val_loss: NotRequired[float | None]
    seconds: NotRequired[float]
    parts: NotRequired[list[list[float]]]


class Result(TypedDict):
    """`result.json`: scores, seconds and hashes. More keys may stand in it."""

    train_seconds: float
    test_accuracy: float
    test_accuracy_interval: list[float]
    test_loss: NotRequired[float]
    val_accuracy: NotRequired[float | None]
    recipe: NotRequired[str]
    steps: NotRequired[int]
    weights_sha256: NotRequired[str]
    images_per_second: NotRequired[float]
    data_seconds: NotRequired[float]
    evaluation_seconds: NotRequired[float]
    evaluation: NotRequired[dict[str, Any]]
    leak: NotRequired[str | None]
    weights: NotRequired[str]
    repair: NotRequired[dict[str, dict[str, float]] | None]
    length: NotRequired[dict[str, int | None]]
    baselines: NotRequired[dict[str, dict[str, Any]] | None]


class Look(TypedDict):
    """`look.json`: what was seen of own data before the training."""

    leak: str | None


@dataclass(frozen=True)
class Run:
    """A run's folder, opened."""

    path: Path
    task: Task

    @property
    def result(self) -> Result | None:
        """The scores, or None while the run is unfinished."""
        path = self.path / "result.json"
        return checked(read_json(path), Result, path) if path.exists() else None

    def finished(self) -> Result:
        """The scores.

        Raises:
            UserError: the run is unfinished.
        """
        result = self.result
        if result is None:
            raise UserError(
                f"run {str(self.path)!r} is unfinished: go on with "
                f"`normlab train --resume {shlex.quote(str(self.path))}` first"
            )
        return result

    @property
    def history(self) -> list[Row]:
        """One entry an epoch: losses, accuracies, seconds."""
        return read_history(self.path)

    @property
    def leak(self) -> str | None:
        """What the look at the data before the training said of test pictures trained on."""
        path = self.path / "look.json"
        if not path.exists():
            return None
        found: Look = checked(read_json(path), Look, path)
        return found["leak"]

    @property
    def environment(self) -> Environment:
        """On what the run was begun; under `later` what it went on with, if that was another."""
        path = self.path / "environment.json"
        found: Environment = checked(read_json(path), Environment, path)
        return found

    @property
    def kept(self) -> str:
        """Which weights the run keeps, `last`, `best` or `recalibrated`: those of its result."""
        result = self.result
        return "last" if result is None else result.get("weights", "last")

    def check_data(self, images: ImageData) -> None:
        """Refuse data that its network cannot have been made for.

        Raises:
            DataError: other classes, or images of another size.
        """
        task, size = self.task, images.x_test.shape[1:3]
        if images.class_names != task.class_names:
            raise DataError(
                f"data {images.name!r} has other classes ({listed(images.class_names)}) than "
                f"run {self.path} ({listed(task.class_names)}): give data with the same ones"
            )
        if size != (task.image_size, task.image_size):
            raise DataError(
                f"data {images.name!r} has images of {size[0]} × {size[1]} pixels, run {self.path} "
                f"takes {task.image_size} × {task.image_size}: resize them"
            )

    def model(self, weights: str = "kept") -> nn.Module:
        """Return the trained network in evaluation mode.

        Args:
            weights: `kept` (those that the run's result is about), `last` (after the last step),
                `best` (at the lowest validation loss) or `recalibrated` (with the statistics of all
                training images).

        Raises:
            UserError: other weights, or a run that does not have these.
        """
        if weights not in WEIGHTS:
            raise UserError(f"unknown weights {nearest(weights, WEIGHTS)}")
        weights = self.kept if weights == "kept" else weights
        if weights not in WEIGHTS:  # what `result.json` says may be of anybody
            raise DataError(f"{self.path / 'result.json'} names unknown weights")
        path = self.path / f"{weights}.safetensors"
        if not path.exists():
            why = "it held out no images to choose by" if self.result else "it is unfinished"
            if weights == "recalibrated":
                why = "`normlab recalibrate` makes it"
            raise UserError(
                f"run {self.path} has no {path.name}: {why}; use another run or weights"
            )
        tensors, _ = read_tensors(path)
        found, expected = sum(t.numel() for t in tensors.values()), self.task.values()
        if found != expected:  # before a network of any size is built
            raise DataError(
                f"{path} does not fit the recipe beside it: it holds {found:,} values, the "
                f"network has {expected:,}"
            )
        model = self.task.build()
        try:
            model.load_state_dict(tensors)
        except RuntimeError as e:
            reason = str(e).splitlines()[-1].strip()
            raise DataError(f"{path} does not fit the recipe beside it: {reason}") from None
        return model.eval()


def read_history(folder: Path) -> list[Row]:
    """The rows of `history.jsonl` in `folder`; none where there is no such file.

    Raises:
        DataError: it is damaged.
    """
    path = folder / "history.jsonl"
    if not path.exists():
        return []
    try:
        rows = [json.loads(line) for line in read_text(path).splitlines()]
    except DataError:
        raise
    except (ValueError, OSError, RecursionError) as e:
        raise DataError(f"{path} cannot be read as lines of JSON ({e})") from None
    return [checked(as_object(row, path), Row, path) for row in rows]


def open_run(path: str | Path | None = None) -> Run:
    """Open the run at `path`; without one, the run in `runs/` with the highest number.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    folder = latest() if path is None else Path(path)
    if not folder.is_dir():
        near = str(RUNS / folder)
        hint = f"did you mean {near!r}?" if os.path.isdir(near) else "`normlab train` makes one"
        raise UserError(f"run {str(folder)!r} is not a folder: {hint}")
    file = folder / "recipe.json"
    values = read_json(file)
    try:
        return Run(folder, Task.from_dict(values, "it"))
    except UserError as e:
        raise DataError(f"{file} is not a run's recipe ({e})") from None
