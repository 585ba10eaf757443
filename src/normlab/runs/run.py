"""A run is a folder; this is what stands in it and how it is found again.

recipe.json        what was asked for, resolved: recipe, seed, data
environment.json   on what: versions, processor, threads
history.jsonl      one line an epoch
checkpoint.safetensors, checkpoint.previous.safetensors   while unfinished: where to go on
start.safetensors  while unfinished: where a run that starts from another began
last.safetensors   weights after the last step
best.safetensors   weights at the lowest validation loss
recalibrated.safetensors   the last weights with the statistics of a whole set of images
result.json        the scores; there once the run is finished
curves.png, report.html
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from normlab.core.files import LOCK, read_tensors
from normlab.core.places import read_text
from normlab.errors import DataError, UserError
from normlab.models import MODELS
from normlab.recipes import Recipe

if TYPE_CHECKING:
    from normlab.data import ImageData
    from normlab.evaluation.evaluation import Evaluation

RUNS = Path("runs")
WEIGHTS = ("last", "best", "recalibrated")
STATISTICS = ("keep", "adapt", "recalibrate")
# What is read back, and of what kind it must be.
_NUMBER = (int, float)
_IN_ENVIRONMENT = {"threads": int, "device": str}
_IN_HISTORY = {"epoch": int, "steps": int, "val_accuracy": (int, float, type(None))}
_IN_RESULT = {"train_seconds": _NUMBER, "test_accuracy": _NUMBER, "test_accuracy_interval": list}
NUMBERED = re.compile(r"(\d{4,})-.+")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Which run a training starts from, and how; see `normlab.training.starting_points`.

    Attributes:
        run: its folder, as it was named.
        weights_sha256: of the weights taken from it.
        head: `kept` or `new`, the output layer.
        freeze: whether the output layer alone learns.
        statistics: `keep`, `adapt` or `recalibrate`.
    """

    run: str
    weights_sha256: str
    head: str
    freeze: bool
    statistics: str

    def __str__(self) -> str:
        statistics = {"keep": "kept", "adapt": "adapting", "recalibrate": "recalibrated, then kept"}
        return (
            f"run {self.run}: body {'frozen' if self.freeze else 'learning on'}, statistics "
            f"{statistics[self.statistics]}, output layer {self.head}"
        )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What `recipe.json` holds: all that decides the weights."""

    recipe: Recipe
    seed: int
    data: str
    data_sha256: str
    class_names: tuple[str, ...]
    image_size: int
    skip_bad: bool = False
    start: Start | None = None

    def load(self, data: "str | Path | Mapping[str, Any] | ImageData | None" = None) -> "ImageData":
        """The run's data, or `data`, with pictures read as the run's were.

        Raises:
            DataError: the run names a place that this user has not given before: whoever sent the
                run chose it.
        """
        from normlab.data import load
        from normlab.data.given import was_given
        from normlab.data.loading import PUBLIC

        if data is None and self.data not in PUBLIC and not was_given(Path(self.data)):
            raise DataError(
                f"the run's data are {self.data!r}, a place that was not named here before, so it "
                "is not read: name it once with --data, as in `normlab evaluate RUN --data DATA`"
            )
        chosen = self.data if data is None else data
        return load(chosen, image_size=self.image_size, skip_bad=self.skip_bad)

    def build(self) -> nn.Module:
        """Make the network with its initial values."""
        return MODELS[self.recipe.model](
            num_classes=len(self.class_names),
            image_size=self.image_size,
            norm=self.recipe.norm,
            norm_position=self.recipe.norm_position,
            seed=self.seed,
        )

    def values(self) -> int:
        """How many weights and statistics the network has; nothing is built for it.

        Raises:
            DataError: no network of such a size can be.
        """
        try:
            with torch.device("meta"):
                return sum(t.numel() for t in self.build().state_dict().values())
        except (RuntimeError, OverflowError, TypeError) as e:
            raise DataError(
                f"a network for images of {self.image_size} × {self.image_size} cannot be "
                f"({str(e).splitlines()[0][:100]})"
            ) from None

    def as_dict(self) -> dict[str, Any]:
        values = {
            "recipe": self.recipe.as_dict(),
            "seed": self.seed,
            "data": self.data,
            "data_sha256": self.data_sha256,
            "class_names": list(self.class_names),
            "image_size": self.image_size,
            "skip_bad": self.skip_bad,
        }
        return values if self.start is None else {**values, "start": asdict(self.start)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Task":
        return cls(
            recipe=Recipe.from_dict(values["recipe"]),
            seed=int(values["seed"]),
            data=str(values["data"]),
            data_sha256=str(values["data_sha256"]),
            class_names=tuple(map(str, values["class_names"])),
            image_size=int(values["image_size"]),
            skip_bad=bool(values.get("skip_bad", False)),
            start=Start(**values["start"]) if "start" in values else None,
        )


@dataclass(frozen=True)
class Run:
    """A run's folder, opened."""

    path: Path
    task: Task

    @property
    def result(self) -> dict[str, Any] | None:
        """The scores, or None while the run is unfinished."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        return _expect(path, read_json(path), _IN_RESULT)

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry an epoch: losses, accuracies, seconds."""
        path = self.path / "history.jsonl"
        if not path.exists():
            return []
        try:
            rows = [json.loads(line) for line in read_text(path).splitlines()]
        except DataError:
            raise
        except (ValueError, OSError, RecursionError) as e:
            raise DataError(f"{path} cannot be read as lines of JSON ({e})") from None
        return [_expect(path, row, _IN_HISTORY) for row in rows]

    @property
    def environment(self) -> dict[str, Any]:
        path = self.path / "environment.json"
        return _expect(path, read_json(path), _IN_ENVIRONMENT)

    def model(self, weights: str = "last") -> nn.Module:
        """Return the trained network in evaluation mode.

        Args:
            weights: `last` (after the last step), `best` (at the lowest validation loss) or
                `recalibrated` (the last with statistics from `normlab recalibrate`).

        Raises:
            UserError: other weights, or a run that does not have these.
        """
        if weights not in WEIGHTS:
            raise UserError(f"weights {weights!r}: choose one of {', '.join(WEIGHTS)}")
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

    def evaluate(
        self, data: Any = None, *, weights: str = "last", views: str = "single"
    ) -> "Evaluation":
        """Score the run on the test images; see `normlab.evaluate`."""
        from normlab.evaluation.evaluation import evaluate

        return evaluate(self, data, weights=weights, views=views)

    def _repr_html_(self) -> str:
        """Show the report's heart in a notebook cell."""
        from normlab.reports.run_report import run_summary_html

        return run_summary_html(self)


def _expect(path: Path, values: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The object itself, if under each key there is something of its kind."""
    for key, kind in kinds.items():
        if not isinstance(values, dict) or not isinstance(values.get(key), kind):
            raise DataError(f"{path} has no sound {key!r}: it is not as normlab wrote it")
    return dict(values)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: it is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(read_text(path))
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: name the folder of a run") from None
    except (ValueError, OSError, RecursionError) as e:
        raise DataError(f"{path} cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object: it is not one that normlab wrote")
    return value


def open_run(path: str | Path | None = None) -> Run:
    """Open the run at `path`; without one, the run in `runs/` with the highest number.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    folder = latest() if path is None else Path(path)
    if not folder.is_dir():
        raise UserError(f"run {str(folder)!r} is not a folder: name one that `normlab train` made")
    values = read_json(folder / "recipe.json")
    try:
        return Run(folder, Task.from_dict(values))
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        if isinstance(e, UserError):
            raise
        raise DataError(f"{folder / 'recipe.json'} is not a run's recipe ({e!r})") from None


def latest(runs: Path = RUNS) -> Path:
    """Return the run with the highest number; the clock has no say.

    Raises:
        UserError: there is none.
    """
    numbered = _numbered(runs)
    if not numbered:
        raise UserError(f"no run in {str(runs)!r}: `normlab train` makes one, or name a run")
    return max(numbered)[1]


def create_folder(out: str | Path | None, recipe: str) -> Path:
    """Make a run's folder: `out`, new or empty, or the next number in `runs/`.

    Raises:
        UserError: it is not empty or cannot be written.
    """
    try:
        return _create_numbered(RUNS, recipe) if out is None else _create(Path(out))
    except OSError as e:
        where = e.filename or out or RUNS
        raise UserError(
            f"cannot make the folder {str(where)!r} ({e.strerror}): choose another --out"
        ) from None


def _create(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if any(p.name != LOCK for p in folder.iterdir()):  # of a process that was killed
        raise UserError(f"folder {str(folder)!r} is not empty: choose a new one for --out")
    return folder


def _create_numbered(runs: Path, recipe: str) -> Path:
    """Take the next number. A reservation `.NNNN` keeps two processes from taking the same one."""
    runs.mkdir(parents=True, exist_ok=True)
    while True:
        number = max((n for n, _ in _numbered(runs)), default=0) + 1
        reservation = runs / f".{number:04d}"
        try:
            reservation.mkdir()
        except FileExistsError:
            continue
        try:
            if all(n < number for n, _ in _numbered(runs)):
                folder = runs / f"{number:04d}-{recipe}"
                folder.mkdir()
                return folder
        finally:
            reservation.rmdir()


def _numbered(runs: Path) -> list[tuple[int, Path]]:
    if not runs.is_dir():
        return []
    found = [(NUMBERED.fullmatch(p.name), p) for p in runs.iterdir() if p.is_dir()]
    return [(int(match[1]), path) for match, path in found if match]
