"""Recordings prepared for looking at: a label, layers to compare, derived quantities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from normlab.core.records import checked, read_json
from normlab.inspection.recording import WATCHED, Recording, read_recording
from normlab.runs import Run, open_run, read_history
from normlab.text import printable


class _About(TypedDict):
    """What `watch.json` has to have."""

    label: str
    seconds: float


@dataclass(frozen=True)
class Inspected:
    """A run's recording and what to call it."""

    label: str
    recording: Recording
    history: Sequence[Mapping[str, Any]]
    seconds: float | None

    @property
    def cost(self) -> float | None:
        """Seconds of recording as a share of the training's; None while it is unfinished."""
        if self.seconds is None:
            return None
        return float(self.recording.arrays["seconds"].sum()) / self.seconds

    @property
    def drift(self) -> float | None:
        """How far one step moves the mean input of a weight layer behind the first, in its σ.

        The median over the layers and the samples; None where no step is known.
        """
        drifts = [self.recording.arrays[f"{x}/in/drift"] for x in shared_layers([self], "weight")]
        known = np.concatenate([x[np.isfinite(x)] for x in drifts[1:]] or [np.empty(0, np.float32)])
        return float(np.median(known)) if len(known) else None


def inspected(run: Run | Path) -> Inspected:
    """Read what `normlab train --record`, or a `normlab.watch` into a folder, kept.

    Raises:
        UserError: the run was not recorded.
        DataError: its recording is damaged.
    """
    if not isinstance(run, Run):
        about = checked(read_json(run / WATCHED), _About, run / WATCHED)
        seconds = float(about["seconds"])
        return Inspected(printable(about["label"]), read_recording(run), read_history(run), seconds)
    recipe, result = run.task.recipe, run.result
    return Inspected(
        label=f"{recipe.name}, norm {recipe.norm.name}, seed {run.task.seed}",
        recording=read_recording(run.path),
        history=run.history,
        seconds=None if result is None else float(result["train_seconds"]),
    )


def open_recorded(path: str | Path | None) -> Run | Path:
    """The run in a folder, or the folder itself if it was watched.

    Raises:
        UserError: it is neither.
    """
    if path is not None and (Path(path) / WATCHED).exists():
        return Path(path)
    return open_run(path)


def shared_layers(runs: Sequence[Inspected], kind: str) -> list[str]:
    """Layers that all runs have: weight layers (`weight`) or places of a normaliser (`place`).

    Where there are none of one kind, those of the other stand in for them.
    """
    first, *others = (run.recording for run in runs)
    common = [x for x in first.layers if all(x in other.layers for other in others)]
    weights = [x for x in common if first.get(x, "weight_norm") is not None]
    if kind == "weight":
        return weights or common
    return [x for x in common if x not in weights] or weights


def running_gap(recording: Recording, layer: str) -> NDArray[np.float32] | None:
    """How far the running means are from the probe's, in its standard deviations (T,)."""
    running = recording.get(layer, "running_mean")
    if running is None:
        return None
    mean, var = (recording.arrays[f"{layer}/in/{key}"] for key in ("mean", "var"))
    return np.asarray((np.abs(running - mean) / np.sqrt(var + 1e-12)).mean(1), np.float32)


def describe(run: Inspected) -> str:
    """What a recording says, in one line."""
    drift = "an unknown distance" if run.drift is None else f"{run.drift:.2g} σ"
    cost = "" if run.cost is None else f"; recording took {run.cost:.1%} of the training time"
    return (
        f"{run.label}: {len(run.recording.steps)} samples; one step moves the mean input of a "
        f"weight layer behind the first by {drift} (median){cost}"
    )
