"""Two pictures: speeds beside the peers', and accuracy against training time."""

import json
import math
import statistics
from collections import Counter
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator, PercentFormatter

from benchmarks import groups
from benchmarks.recipe_table import Run, kept, timed
from benchmarks.summary import (
    EPOCHS,
    Result,
    Spread,
    names,
    notebook,
    processor,
    rates,
    seconds,
    spread,
)
from normlab.recipes import RECIPES

# Apart in lightness, so that they stay apart in grey.
OURS, OTHERS, INK = "#1b4f72", "#a9b7c0", "#222222"

# The seed notebook's own printed output.
AUTHOR_VALIDATION = {
    **dict(enumerate((0.654, 0.717, 0.7464, 0.7486, 0.768, 0.7888, 0.7852, 0.7892, 0.7956), 1)),
    25: 0.807,
}
AUTHOR_TEST = 0.7896
Point = tuple[float, float]


def save(fig: Figure, path: Path) -> None:
    """Write PNG and SVG."""
    fig.savefig(path.with_suffix(".png"), dpi=150)
    fig.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def draw_speeds(result: Result) -> Figure:
    """Training and inference of the notebook's network, every peer a bar."""
    fig = Figure(figsize=(10, 6.2), layout="constrained")
    axes = fig.subplots(2, 2).flat
    for ax, batch in zip(axes, groups.BATCHES, strict=False):
        group = f"training-{batch}"
        bars = {name: spread(rates(result, group, name)) for name in names(result, group)}
        plot_bars(ax, bars, f"training, batch {batch}: images/s", "{:,.0f}")
    group = "inference-notebook"
    many = {name: spread(rates(result, group, name, "256")) for name in names(result, group)}
    plot_bars(axes[2], many, "inference, batch 256: images/s", "{:,.0f}")
    one = {
        name: spread([1e3 * s for s in seconds(result, group, name, "1")])
        for name in names(result, group)
    }
    plot_bars(axes[3], one, "inference, one picture: ms, log scale", "{:,.2f}")
    axes[3].set_xscale("log")
    low, high = min(s.low for s in one.values()), max(s.q3 for s in one.values())
    axes[3].set_xlim(low / 2, high * (high / low) ** 0.17)
    fig.suptitle("The notebook's network; medians, lines from quartile to quartile", fontsize=11)
    return fig


def plot_bars(ax: Axes, bars: dict[str, Spread], title: str, form: str) -> Axes:
    """Draw a bar for each name, its value beside it; ours are dark."""
    labels = list(bars)
    values = [bars[name].median for name in labels]
    colors = [OURS if _is_ours(name) else OTHERS for name in labels]
    rows = range(len(labels))
    ax.barh(rows, values, color=colors, height=0.68)
    ends = [bars[name].q3 for name in labels]
    starts = [bars[name].q1 for name in labels]
    ax.hlines(rows, starts, ends, color="white", lw=3)  # the next ones are to be seen on dark bars
    ax.hlines(rows, starts, ends, color=INK, lw=1)
    for row, value, end in zip(rows, values, ends, strict=True):
        ax.annotate(
            form.format(value),
            (max(value, end), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    ax.set_yticks(rows, labels, fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.17 * max(ends))
    ax.set_title(title, fontsize=10, loc="left")
    ax.tick_params(which="both", left=False, bottom=False, labelbottom=False)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    return ax


def _is_ours(name: str) -> bool:
    return name.startswith(groups.OURS) or name == groups.FOLDED


def headline_runs(results: Path, here: str) -> dict[str, list[Run]]:
    """By recipe, the seeds that had the whole machine; not those of the recipe as it was before.

    The notebook's is not among them: its curve is drawn by itself.
    Of several processors one: `here`, or else the one with the most seeds of all recipes.
    """
    found: dict[str, dict[str, list[Run]]] = {}
    seeds: Counter[str] = Counter()
    for recipe, runs in kept(results).items():
        for run in runs if recipe in RECIPES and recipe != "notebook" else []:
            if timed([run]):
                at = processor(run["environment"])
                found.setdefault(recipe, {}).setdefault(at, []).append(run)
                seeds[at] += 1
    return {
        recipe: runs[max(runs, key=lambda at: (at == here, seeds[at]))]
        for recipe, runs in found.items()
    }


def draw_accuracy_time(result: Result, results: Path) -> Figure:
    """Test accuracy against training time: recipes, and the notebook at the measured speeds.

    Args:
        results: `docs/results`, with the runs of `headline` and of `notebook`.
    """
    fig = Figure(figsize=(9, 5.2), layout="constrained")
    ax = fig.subplots()
    here = processor(result["machine"])
    runs = headline_runs(results, here)
    points = {
        recipe: [(run["train_seconds"], run["test_accuracy"]) for run in whole]
        for recipe, whole in runs.items()
    }
    foreign: set[str] = set()
    for recipe, whole in runs.items():
        below = _has_better_neighbour(points[recipe], list(points.values()))
        elsewhere = {processor(run["environment"]) for run in whole} - {here}
        foreign |= elsewhere
        plot_recipe(ax, recipe + "*" * bool(elsewhere), points[recipe], below=below)
    folder = results / "notebook" / "notebook"
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    ours = {row["epoch"]: row["val_accuracy"] for row in map(json.loads, lines)}
    our_test = json.loads((folder / "result.json").read_text(encoding="utf-8"))["test_accuracy"]
    epoch = {peer: spread(notebook(result, peer, 1)).median for peer in (groups.KERAS, groups.OURS)}
    plot_notebook(ax, "the notebook,\nKeras on TensorFlow", epoch[groups.KERAS], AUTHOR_VALIDATION)
    plot_notebook(ax, "the notebook,\nnormlab", epoch[groups.OURS], ours, dashed=True)
    plot_end(ax, epoch[groups.KERAS], AUTHOR_TEST)
    plot_end(ax, epoch[groups.OURS], our_test)
    ax.set_xscale("log")
    ax.set_xlabel("training time in seconds, validation included")
    ax.set_ylabel("accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.yaxis.set_major_locator(MultipleLocator(0.02))
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.08 * (high - low), high + 0.06 * (high - low))  # room for words
    low, high = ax.get_xlim()
    ax.set_xlim(low / 1.5, high * 1.5)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:,g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(
        "Dots: test accuracy at the end of a training, one view a picture. "
        "Lines: validation accuracy after each epoch."
        + (f"\n* on {', '.join(sorted(foreign))}" if foreign else ""),
        fontsize=10,
        loc="left",
    )
    return fig


def _middle(points: list[Point]) -> Point:
    times, scores = zip(*points, strict=True)
    return statistics.median(times), statistics.mean(scores)


def _has_better_neighbour(points: list[Point], recipes: list[list[Point]]) -> bool:
    """Whether another recipe of about the same time scores higher, so that words go below."""
    time, score = _middle(points)
    others = [_middle(p) for p in recipes]
    return any(s > score and time / 2 < t < time * 2 for t, s in others)


def plot_recipe(ax: Axes, name: str, points: list[Point], *, below: bool) -> Axes:
    """A dot for each seed, and what they come to."""
    times, scores = zip(*points, strict=True)
    time, mean = _middle(points)
    ax.plot(times, scores, "o", ms=5, color=OURS, alpha=0.55, mew=0, ls="")
    text = f"{name}\n{mean:.1%} in {time:,.0f} s, n = {len(points)}"
    ax.annotate(
        text,
        (math.sqrt(min(times) * max(times)), min(scores) if below else max(scores)),
        xytext=(0, -6 if below else 6),
        textcoords="offset points",
        ha="center",
        va="top" if below else "bottom",
        fontsize=9,
        color=OURS,
    )
    return ax


def plot_notebook(
    ax: Axes, label: str, epoch: float, accuracy: dict[int, float], *, dashed: bool = False
) -> Axes:
    """A line over the epochs, each of `epoch` seconds; its name where it begins."""
    color = OURS if dashed else "#6b7780"
    times = [epoch * e for e in accuracy]
    ax.plot(times, list(accuracy.values()), color=color, lw=1.4, ls="--" if dashed else "-")
    first = next(iter(accuracy))
    ax.annotate(
        label,
        (epoch * first, accuracy[first]),
        xytext=(0, -6),
        textcoords="offset points",
        ha="right" if dashed else "left",  # two names stand beside each other
        va="top",
        fontsize=9,
        color=color,
    )
    return ax


def plot_end(ax: Axes, epoch: float, test_accuracy: float) -> Axes:
    """The test accuracy after the last epoch."""
    time = EPOCHS * epoch
    ax.plot([time], [test_accuracy], "o", ms=7, color=INK)
    ax.annotate(
        f"{test_accuracy:.1%}\nin {time:,.0f} s",
        (time, test_accuracy),
        xytext=(0, -8),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=9,
    )
    return ax
