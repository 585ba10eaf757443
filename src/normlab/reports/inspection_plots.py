"""Drawings of recordings: one column for each run, the same scales across a row."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from normlab.inspection.inspected import Inspected, shared_layers
from normlab.inspection.landscape import MEASURES, Landscape
from normlab.reports.plots import figure, named

BLUE, RED = "#2f6fb2", "#c8442c"
RIDGES = 14
MOST_ROWS = 16  # of layers one below the other; of a deeper network an even choice
MOST_NAMES = 10  # in a legend
ARM_TITLES = {"batch": "with batch normalisation", "none": "without"}
MEASURE_TITLES = {
    "range": "range of losses along the gradient",
    "change": "largest change of the gradient, share of its norm",
    "smoothness": "effective β-smoothness",
    "agreement": "cosine of a step's gradient and the next's",
}


def draw_figure_1(runs: Sequence[Inspected]) -> Figure:
    """The paper's figure 1: (a) accuracy; (b, c) a unit behind the last normaliser's place.

    Without (a) where no images were held out.
    """
    layer = shared_layers(runs, "place")[-1]
    scored = [run for run in runs if any(row["val_accuracy"] is not None for row in run.history)]
    count = len(runs) + bool(scored)
    fig = figure(4.2 * count, 3.4)
    axes = list(fig.subplots(1, count, squeeze=False)[0])
    if scored:
        _draw_accuracy(axes.pop(0), runs)
    for ax, run, letter in zip(axes, runs, "bc", strict=False):
        plot_percentiles(ax, run, layer, "out/unit")
        ax.set(xlabel="step", title=f"({letter}) {named(run.label)}")
    axes[0].set_ylabel(f"output of {named(layer)}, one unit")
    _share_y(axes)
    return fig


def _draw_accuracy(ax: Axes, runs: Sequence[Inspected]) -> None:
    for run, color in zip(runs, (BLUE, RED), strict=False):
        rows = [row for row in run.history if row["val_accuracy"] is not None]
        steps = [row["steps"] for row in rows]
        ax.plot(steps, [row["val_accuracy"] for row in rows], color=color, label=named(run.label))
    ax.set(xlabel="step", ylabel="accuracy on held-out images", title="(a)")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8)


def draw_percentiles(runs: Sequence[Inspected]) -> Figure:
    """15th, 50th and 85th percentile of what each normaliser's place hands on."""
    layers = _some(shared_layers(runs, "place"))
    fig = figure(5 * len(runs), 1.9 * len(layers) + 0.5)
    for row, layer in zip(_grid(fig, layers, runs), layers, strict=True):
        for ax, run in zip(row, runs, strict=True):
            plot_percentiles(ax, run, layer, "out/percentiles")
            ax.set_xscale("log")
        row[0].set_ylabel(named(layer), fontsize=8)
        _share_y(row)
    return fig


def plot_percentiles(ax: Axes, run: Inspected, layer: str, key: str) -> Axes:
    """Draw three percentiles over the steps; the band is what 70 % of the values lie in."""
    steps, values = run.recording.steps, run.recording.get(layer, key)
    if values is None:
        return ax
    low, middle, high = values.T
    ax.fill_between(steps, low, high, color=BLUE, alpha=0.15, lw=0)
    ax.plot(steps, low, color=BLUE, lw=0.9)
    ax.plot(steps, middle, color=RED, lw=1.3)
    ax.plot(steps, high, color=BLUE, lw=0.9)
    ax.grid(alpha=0.2)
    return ax


def draw_ridges(runs: Sequence[Inspected]) -> Figure:
    """Histograms over time, the first step at the back."""
    layers = _some(shared_layers(runs, "place"))
    fig = figure(5 * len(runs), 2.5 * len(layers) + 0.5)
    for row, layer in zip(_grid(fig, layers, runs, "value"), layers, strict=True):
        for ax, run in zip(row, runs, strict=True):
            plot_ridges(ax, run, layer)
        row[0].set_ylabel(f"{named(layer)}, step", fontsize=8)
        limits = [run.recording.arrays[f"{layer}/out/range"] for run in runs]
        low = min(np.quantile(values[:, 0], 0.1) for values in limits)
        high = max(np.quantile(values[:, 1], 0.9) for values in limits)
        for ax in row:
            ax.set_xlim(low, high)
    return fig


def plot_ridges(ax: Axes, run: Inspected, layer: str) -> Axes:
    """Draw the output's histogram at up to 14 of the sampled steps; heights are √density."""
    recording = run.recording
    histograms = recording.arrays[f"{layer}/out/histogram"]
    ranges = recording.arrays[f"{layer}/out/range"]
    chosen = np.unique(np.linspace(0, len(recording.steps) - 1, RIDGES).round().astype(int))
    colors = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(chosen)))
    ticks = []
    for place, (index, color) in enumerate(zip(chosen, colors, strict=True)):
        low, high = ranges[index]
        edges = np.linspace(low, high, histograms.shape[1] + 1)
        density = np.sqrt(histograms[index] / max(histograms[index].max(), 1))
        base = float(len(chosen) - place)
        centers = (edges[:-1] + edges[1:]) / 2
        ax.fill_between(centers, base, base + 1.8 * density, color=color, alpha=0.75, zorder=place)
        ax.plot(centers, base + 1.8 * density, color="white", lw=0.6, zorder=place)
        ticks.append((base, f"{recording.steps[index]:,}"))
    ax.set_yticks([t[0] for t in ticks][::3], [t[1] for t in ticks][::3], fontsize=7)
    return ax


def draw_drift(runs: Sequence[Inspected]) -> Figure:
    """How far one step moves the mean input of each weight layer."""
    layers = shared_layers(runs, "weight")
    return _draw_lines(runs, layers, "in/drift", "shift of the mean input in one step, in σ")


def draw_gradients(runs: Sequence[Inspected]) -> Figure:
    """Gradient flow: the norm of the loss's gradient by each layer's weights."""
    layers = shared_layers(runs, "weight")
    return _draw_lines(runs, layers, "weight_grad", "norm of the gradient by the weights")


def draw_rates(runs: Sequence[Inspected]) -> Figure:
    """The effective learning rate of each weight layer."""
    layers = shared_layers(runs, "weight")
    return _draw_lines(runs, layers, "effective_rate", "effective rate lr/‖w‖²")


def draw_gamma_beta(runs: Sequence[Inspected]) -> Figure | None:
    """γ and β of each normaliser: the median over its channels and the middle 70 %."""
    runs = [run for run in runs if any(k.endswith("/gamma") for k in run.recording.arrays)]
    if not runs:
        return None
    fig = figure(5 * len(runs), 5.2)
    grid = fig.subplots(2, len(runs), squeeze=False, sharex=True, sharey="row")
    for row, key, symbol in zip(grid, ("gamma", "beta"), "γβ", strict=True):
        row[0].set_ylabel(symbol)
        for ax, run in zip(row, runs, strict=True):
            layers = [x for x in run.recording.layers if run.recording.get(x, key) is not None]
            for layer, color in zip(layers, _depth_colors(len(layers)), strict=True):
                low, middle, high = np.percentile(
                    run.recording.arrays[f"{layer}/{key}"], (15, 50, 85), axis=1
                )
                ax.fill_between(run.recording.steps, low, high, color=color, alpha=0.15, lw=0)
                label = named(layer) if layer in _some(layers, MOST_NAMES) else None
                ax.plot(run.recording.steps, middle, color=color, lw=1.2, label=label)
            ax.set_xscale("log")
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.grid(alpha=0.2)
    for ax, run in zip(grid[0], runs, strict=True):
        ax.set_title(named(run.label), fontsize=10)
        ax.legend(frameon=False, fontsize=7)
    for ax in grid[-1]:
        ax.set_xlabel("step")
    return fig


def draw_landscape(landscape: Landscape) -> Figure:
    """Each measure over the steps: the mean over the seeds, and the band from lowest to highest."""
    fig = figure(10, 6.6)
    for ax, measure in zip(fig.subplots(2, 2).flat, MEASURES, strict=True):
        for (arm, measures), color in zip(landscape.arms.items(), (BLUE, RED), strict=True):
            values = measures[measure]
            ax.fill_between(
                landscape.steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0
            )
            ax.plot(landscape.steps, values.mean(0), color=color, label=ARM_TITLES[arm], lw=1.3)
        if measure != "agreement":
            ax.set_yscale("log")
        ax.set_title(MEASURE_TITLES[measure], fontsize=10)
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
    fig.axes[0].legend(frameon=False, fontsize=9)
    return fig


def _draw_lines(runs: Sequence[Inspected], layers: Sequence[str], key: str, ylabel: str) -> Figure:
    fig = figure(5 * len(runs), 3.6)
    axes = list(fig.subplots(1, len(runs), squeeze=False)[0])
    told = _some(layers, MOST_NAMES)
    for ax, run in zip(axes, runs, strict=True):
        for layer, color in zip(layers, _depth_colors(len(layers)), strict=True):
            values = run.recording.arrays[f"{layer}/{key}"]
            shown = values > 0  # the axis is logarithmic; also leaves out NaN
            label = named(layer) if layer in told else None
            ax.plot(run.recording.steps[shown], values[shown], color=color, lw=1.2, label=label)
        ax.set_xlabel("step")
        ax.set_title(named(run.label), fontsize=10)
        ax.grid(alpha=0.2)
        if any(len(line.get_xydata()) for line in ax.lines):  # logarithms of nothing fail
            ax.set(xscale="log", yscale="log")
            ax.xaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel(ylabel)
    axes[-1].legend(frameon=False, fontsize=7)
    _share_y([ax for ax in axes if ax.get_yscale() == "log"])
    return fig


def _grid(
    fig: Figure, layers: Sequence[str], runs: Sequence[Inspected], xlabel: str = "step"
) -> NDArray[np.object_]:
    """Axes (layers, runs) with a run's label on top of each column."""
    grid: NDArray[np.object_] = fig.subplots(len(layers), len(runs), squeeze=False)
    for ax, run in zip(grid[0], runs, strict=True):
        ax.set_title(named(run.label), fontsize=10)
    for ax in grid[-1]:
        ax.set_xlabel(xlabel)
    return grid


def _some(layers: Sequence[str], most: int = MOST_ROWS) -> list[str]:
    """At most so many of the layers, the first and the last among them."""
    places = np.linspace(0, len(layers) - 1, min(len(layers), most)).round().astype(int)
    return [layers[i] for i in places]


def _share_y(axes: Sequence[Axes]) -> None:
    limits = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _depth_colors(count: int) -> NDArray[np.float64]:
    """From the first layer, dark, to the last, light."""
    return np.asarray(mpl.colormaps["viridis"](np.linspace(0, 0.85, max(count, 1))))
