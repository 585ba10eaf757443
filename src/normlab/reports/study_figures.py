"""A study drawn. Each figure is narrow enough for a phone and takes its ink from the page."""

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from normlab.core.files import write_atomic
from normlab.reports.plots import figure, named, png, safely, style, svg
from normlab.statistics import smallest_p
from normlab.study.judged import Judged
from normlab.study.plan import Plan
from normlab.text import html

if TYPE_CHECKING:
    from normlab.study.design import Design
    from normlab.study.outcomes import Outcome
    from normlab.study.result import Study

INK = "#1c2431"  # in a page it becomes the colour of the text around it
COLORS = ("#c8442c", "#3274b5", "#4d9a48", "#a06ab8", "#c99116", "#2fa3a0", "#8f6d5d", "#8089a0")
STYLE: Any = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "svg.fonttype": "none",
}


def draw_all(study: Any) -> dict[str, Figure]:
    """Every figure of a complete study, by its file's name."""
    low = 0.9 + 0.35 * len(study.design.arms)
    drawings: dict[str, tuple[Any, float]] = {
        "differences": (plot_differences, 1.1 + 0.55 * len(study.comparisons)),
        "curves": (plot_curves, 3.2),
        "pairs": (plot_pairs, 3.2),
        "step-seconds": (plot_step_seconds, low),
        "seconds": (plot_seconds, low),
    }
    for name in ("seconds",) if study.design.kind == "recipe" else ("curves", "step-seconds"):
        del drawings[name]
    figures = {}
    for name, (plot, height) in drawings.items():
        with style(**STYLE):
            fig = figure(4.6, height)
            plot(fig.subplots(), study)
            figures[name] = fig
    return figures


def write_all(study: Judged, captions: Mapping[str, str]) -> dict[str, tuple[Markup, str]]:
    """Write every figure of a study into its folder; each for the page, with its caption."""
    written = {}
    for name, fig in (safely("the study", lambda: draw_all(study)) or {}).items():
        pictures = safely(name, partial(render, fig))
        if pictures is None:
            continue
        for content, kind in zip(pictures, ("png", "svg"), strict=True):
            write_atomic(study.path / f"{name}.{kind}", content)
        written[name] = (Markup(inline(pictures[1], captions[name])), captions[name])
    return written


def summary_html(study: Judged) -> str:
    """A study in a notebook cell: its verdicts and the differences drawn."""
    where = f"<code>{html(str(study.path))}</code>"
    if not study.complete:
        done = f"{len(study.outcomes)} of {study.total} runs"
        return f"<p>unfinished study {where}: {done}, no verdict yet</p>"
    found = "".join(f"<p>{html(finding)}</p>" for finding in study.findings)
    if not study.decided:
        return f"<p><b>no verdict</b></p>{found}<p>{where}</p>"
    sentences = "".join(
        f"<p><b>{html(c.verdict)}</b>: {html(c.sentence)}</p>" for c in study.comparisons
    )
    drawn = safely("the study", lambda: render(draw_all(study)["differences"]))
    label = f"Difference in {html(study.design.measure.name)}"
    svg = "" if drawn is None else inline(drawn[1], label)
    return f'{sentences}{found}<div style="max-width: 34rem">{svg}</div><p>{where}</p>'


def render(fig: Figure) -> tuple[bytes, bytes]:
    """A figure as PNG, on white, and as SVG, without a background."""
    return png(fig, **STYLE), svg(fig, transparent=True, **STYLE)


def inline(svg: bytes, label: str) -> str:
    """An SVG as a part of a page: as wide as its place, in the page's own ink."""
    text = svg.decode().replace(INK, "currentColor")
    text = text[text.index("<svg") :]
    text = re.sub(r'\s(width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def plot_differences(ax: Axes, study: Judged) -> Axes:
    """Each contrast: its pairs as dots, the mean with its interval, zero and the margin."""
    measure, value = study.design.measure, study.design.value
    scale = 100 if measure.fraction else 1
    if study.design.margin is not None:
        margin = scale * study.design.margin
        ax.axvspan(-margin, margin, color=COLORS[-1], alpha=0.25, lw=0)
    ax.axvline(0, color=INK, lw=0.8)
    names = []
    for row, c in enumerate(study.comparisons):
        pairs = study.pairs(c.first, c.other)
        points = [scale * (value(first) - value(other)) for first, other in pairs]
        ax.plot(points, np.full(len(points), row + 0.22), "o", ms=3, alpha=0.6, color=COLORS[1])
        if smallest_p(c.n) <= c.level:  # else so few pairs have no interval to draw
            ax.plot([scale * x for x in c.interval], [row, row], color=COLORS[0], lw=2)
        ax.plot(scale * c.difference, row, "D", color=COLORS[0], ms=6)
        names.append(f"{named(c.first)}\n- {named(c.other)}")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel(f"difference in {named(measure.name)}{', points' if measure.fraction else ''}")
    return ax


def plot_curves(ax: Axes, study: "Study") -> Axes:
    """Each arm's accuracy over the steps: mean over the seeds, and a band over all of them."""
    validation = all(o.curve or o.diverged for o in study.outcomes)
    for arm, color in zip(study.design.arm_names, _colors(study.design), strict=True):
        steps, curves = _curves(list(study.arm(arm).values()), study.design, validation)
        if not len(steps):
            continue
        ax.fill_between(
            steps, 100 * curves.min(0), 100 * curves.max(0), color=color, alpha=0.2, lw=0
        )
        marker = "o" if len(steps) < 30 else ""
        ax.plot(steps, 100 * curves.mean(0), color=color, marker=marker, ms=3, label=named(arm))
    kind = "validation" if validation else "training"
    ax.set(xlabel="steps", ylabel=f"{kind} accuracy, %")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return ax


def plot_pairs(ax: Axes, study: Judged) -> Axes:
    """The runs' values, one line a seed across the arms; crosses are diverged runs."""
    measure, value = study.design.measure, study.design.value
    scale = 100 if measure.fraction else 1
    names = study.design.arm_names
    arms = [study.arm(name) for name in names]
    for seed in sorted(set.intersection(*(set(arm) for arm in arms))):
        heights = [scale * value(arm[seed]) for arm in arms]
        ax.plot(range(len(arms)), heights, color=INK, alpha=0.3, lw=0.9)
    for x, (arm, color) in enumerate(zip(arms, _colors(study.design), strict=True)):
        for outcome in arm.values():
            marker = "x" if outcome.diverged else "o"
            ax.plot(x, scale * value(outcome), marker, color=color, ms=5)
    ax.set_xticks(
        range(len(arms)), [named(name) for name in names], rotation=30 if len(arms) > 4 else 0
    )
    ax.set_xlim(-0.4, len(arms) - 0.6)
    ax.set_ylabel(f"{named(measure.name)}{', %' if measure.fraction else ''}")
    ax.grid(alpha=0.25, axis="y")
    return ax


def plot_step_seconds(ax: Axes, study: "Study") -> Axes:
    """Median milliseconds of a training step, a dot a run and a bar for the median of the runs."""
    names = study.design.arm_names
    for y, (arm, color) in enumerate(zip(names, _colors(study.design), strict=True)):
        found = [o.step_seconds for o in study.arm(arm).values()]
        milliseconds = [1000 * s for s in found if s is not None]
        if milliseconds:
            ax.barh(y, float(np.median(milliseconds)), height=0.6, color=color, alpha=0.45)
            ax.plot(milliseconds, np.full(len(milliseconds), y), "o", ms=3, color=color)
    ax.set_yticks(range(len(names)), [named(name) for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("ms a training step")
    return ax


def plot_seconds(ax: Axes, study: Judged) -> Axes:
    """Seconds of a run, a dot a run and a bar for their median."""
    names = study.design.arm_names
    for y, (arm, color) in enumerate(zip(names, _colors(study.design), strict=True)):
        seconds = [o.seconds for o in study.arm(arm).values()]
        ax.barh(y, float(np.median(seconds)), height=0.6, color=color, alpha=0.45)
        ax.plot(seconds, np.full(len(seconds), y), "o", ms=3, color=color)
    ax.set_yticks(range(len(names)), [named(name) for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("seconds a run")
    return ax


def _colors(design: Plan) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(design.arms))]


def _curves(
    outcomes: "list[Outcome]", design: "Design", validation: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps (T,) and accuracies (runs, T).

    After its last check a diverged run counts as chance; a run that stopped early keeps its last.
    """
    curves = [o.curve if validation else _training_curve(o.history) for o in outcomes]
    longest = max(curves, key=len, default=[])
    filled = []
    for outcome, curve in zip(outcomes, curves, strict=True):
        values = [accuracy for _, accuracy in curve]
        last = 1 / len(design.class_names) if outcome.diverged or not values else values[-1]
        filled.append(values + [last] * (len(longest) - len(values)))
    return np.array([step for step, _ in longest], float), np.array(filled, float)


def _training_curve(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Steps and training accuracies: of the parts of an epoch where they were noted."""
    points, before = [], 0
    for row in history:
        steps = row["steps"] - before
        parts = row.get("parts") or [[1.0, row["loss"], row["accuracy"]]]
        points += [(before + round(done * steps), accuracy) for done, _, accuracy in parts]
        before = row["steps"]
    return points
