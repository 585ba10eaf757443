"""`normlab.inspect`: recordings side by side, as pictures and a page with a slider."""

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from normlab.core.files import write_atomic
from normlab.core.places import make_folder
from normlab.errors import UserError
from normlab.inspection.inspected import (
    Inspected,
    describe,
    inspected,
    open_recorded,
    running_gap,
    shared_layers,
)
from normlab.inspection.recording import Recording
from normlab.reports import inspection_plots as plots_inspect
from normlab.reports.pages import render
from normlab.reports.plots import png, safely, style, svg
from normlab.runs import Run

NUMBERS = ("dead", "grad", "weight_grad", "weight_norm", "effective_rate")


@dataclass(frozen=True)
class Inspection:
    """Recordings side by side.

        seen = normlab.inspect(run, twin)
        seen.figures["drift"]

    Attributes:
        runs: what each run's layers saw.
        figures: every picture of it, by its file's name.
    """

    runs: tuple[Inspected, ...]

    @cached_property
    def figures(self) -> dict[str, Figure]:
        return _drawings(self.runs)

    def __str__(self) -> str:
        return "\n".join(map(describe, self.runs))

    def write(self, folder: Path) -> None:
        """Write `report.html`, and each picture as PNG and SVG, into `folder`."""
        make_folder(folder)
        figures = safely("the recording", lambda: self.figures) or {}
        pictures = {name: save_figure(fig, folder / name) for name, fig in figures.items()}
        drawn = {name: content for name, content in pictures.items() if content is not None}
        write_atomic(folder / "report.html", _page(self.runs, drawn))


def inspect(*runs: Run | str | Path) -> Inspection:
    """Look at what the layers of one recorded run saw, or of two of one model side by side.

    Args:
        runs: with `record=True` trained, opened or by their folders; or folders of `normlab.watch`.

    Raises:
        UserError: no run or more than two, one that was not recorded, or two that have no layer in
            common.
        DataError: a recording is damaged.
    """
    if not 1 <= len(runs) <= 2:
        raise UserError(
            f"{len(runs)} runs to inspect: give one that was trained with record=True, or two"
        )
    opened = [run if isinstance(run, Run) else open_recorded(run) for run in runs]
    seen = tuple(inspected(run) for run in opened)
    if not shared_layers(seen, "weight"):
        names = " and ".join(str(getattr(run, "path", run)) for run in opened)
        raise UserError(f"runs {names} have no layer in common: compare two of one model")
    return Inspection(seen)


def save_figure(fig: Figure, path: Path) -> bytes | None:
    """Write `path`.png and `path`.svg; return the SVG, the same bytes for the same figure.

    None, and a line on standard error, if it cannot be drawn.
    """
    drawn = safely(path.name, lambda: (png(fig), svg(fig)))
    if drawn is None:
        return None
    for suffix, content in zip((".png", ".svg"), drawn, strict=True):
        write_atomic(path.with_suffix(suffix), content)
    return drawn[1]


def _drawings(runs: Sequence[Inspected]) -> dict[str, Figure]:
    with style():
        return _drawn(runs)


def _drawn(runs: Sequence[Inspected]) -> dict[str, Figure]:
    figures = {
        "figure-1": plots_inspect.draw_figure_1(runs),
        "percentiles": plots_inspect.draw_percentiles(runs),
        "ridges": plots_inspect.draw_ridges(runs),
        "drift": plots_inspect.draw_drift(runs),
    }
    if runs[0].recording.get(shared_layers(runs, "weight")[0], "weight_norm") is not None:
        figures["gradients"] = plots_inspect.draw_gradients(runs)
        figures["rates"] = plots_inspect.draw_rates(runs)
    gamma_beta = plots_inspect.draw_gamma_beta(runs)
    return figures if gamma_beta is None else {**figures, "gamma-beta": gamma_beta}


def _page(runs: Sequence[Inspected], pictures: dict[str, bytes]) -> bytes:
    layers = [x for x in runs[0].recording.layers if all(x in r.recording.layers for r in runs)]
    data = {
        "layers": layers,
        "steps": sorted({int(step) for run in runs for step in run.recording.steps}),
        "runs": [_run_data(run, layers) for run in runs],
    }
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return render(
        "inspect.html",
        runs=runs,
        lines=[describe(run) for run in runs],
        data=text.replace("<", "\\u003c"),  # so that no name can end the script element
        pictures={
            name: "data:image/svg+xml;base64," + b64encode(svg).decode()
            for name, svg in pictures.items()
        },
    )


def _run_data(run: Inspected, layers: Sequence[str]) -> dict[str, Any]:
    recording = run.recording
    return {
        "label": run.label,
        "steps": recording.steps.tolist(),
        "loss": _rounded(recording.arrays["loss"]),
        "layers": {layer: _layer_data(recording, layer) for layer in layers},
    }


def _layer_data(recording: Recording, layer: str) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for side in ("in", "out"):
        arrays = {key: recording.arrays[f"{layer}/{side}/{key}"] for key in ("range", "drift")}
        data[side] = {key: _rounded(values) for key, values in arrays.items()}
        data[side]["percentiles"] = _rounded(recording.arrays[f"{layer}/{side}/percentiles"])
        histogram = recording.arrays[f"{layer}/{side}/histogram"]
        data[side]["histogram"] = histogram.astype(int).tolist()
    for key in NUMBERS:
        if (values := recording.get(layer, key)) is not None:
            data[key] = _rounded(values)
    if (gap := running_gap(recording, layer)) is not None:
        data["gap"] = _rounded(gap)
    return data


def _rounded(values: NDArray[np.floating]) -> Any:
    """Nested lists with four significant digits; None for what is not finite."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{v:.4g}") if np.isfinite(v) else None for v in values]
