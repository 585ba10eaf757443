"""Drawings of frozen results. Each takes `ax` and returns it; nothing here computes a score.

What is drawn is drawn in our own style, whatever matplotlibrc stands in the folder; names of
classes, arms and layers are text and never formulas; and a drawing that fails costs the drawing.
"""

import io
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from normlab.text import printable

if TYPE_CHECKING:
    from normlab.evaluation.calibration import Calibration
    from normlab.evaluation.evaluation import Evaluation

TRAIN, VALIDATION = "#7a8699", "#c8442c"
# Letters of a name in a drawing, and beside an axis; more would leave no room for it.
LONGEST, LONGEST_TICK = 60, 24

T = TypeVar("T")


class CellFigure(Figure):
    """A figure that a notebook cell shows, without pyplot and without a magic command."""

    def _repr_png_(self) -> bytes | None:
        return safely("a figure", lambda: png(self, dpi=90))


def safely(what: str, draw: Callable[[], T]) -> T | None:
    """What `draw` returns; None, and one line on standard error that names `what`, if it fails.

    For all that is drawn once a result is there: nothing that cannot be drawn may lose one. Write
    files outside of it, so that a full disk is still an error.
    """
    try:
        with style():
            return draw()
    except Exception as e:  # whatever matplotlib, its fonts or a name may raise
        reason = printable(" ".join(f"{type(e).__name__}: {e}".split()))[:300]
        print(f"normlab: {what} could not be drawn ({reason})", file=sys.stderr, flush=True)
        return None


@contextmanager
def style(**settings: Any) -> Iterator[None]:
    """Matplotlib's own defaults and `settings`: neither the user's nor those of the folder.

    With `text.usetex` a name would be a program of TeX. Glyphs that the font lacks are boxes.
    """
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        wanted: Any = {"svg.hashsalt": "normlab", **settings}
        mpl.rcParams.update(wanted)
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*layout not applied", category=UserWarning)
        yield


def named(name: str, longest: int = LONGEST) -> str:
    """A name as it can be drawn: in one line, not too long, and no formula whatever it holds."""
    text = printable(name)
    text = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return text.replace("$", r"\$")


def names(all_of_them: Iterable[str]) -> list[str]:
    """Names beside an axis."""
    return [named(name, LONGEST_TICK) for name in all_of_them]


def figure(width: float = 7.0, height: float = 4.0) -> Figure:
    """Make a figure that belongs to no window and no global state."""
    return CellFigure(figsize=(width, height), layout="constrained")


def png(fig: Figure, dpi: int = 150, **settings: Any) -> bytes:
    """Render a figure; `settings` as `style` takes them."""
    buffer = io.BytesIO()
    with style(**settings):
        fig.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def svg(fig: Figure, *, transparent: bool = False, **settings: Any) -> bytes:
    """Render a figure, to the same bytes each time."""
    buffer = io.BytesIO()
    with style(**settings):
        fig.savefig(buffer, format="svg", metadata={"Date": None}, transparent=transparent)
    return buffer.getvalue()


def plot_curve(ax: Axes, history: Sequence[Mapping[str, Any]], key: str) -> Axes:
    """Draw `loss` or `accuracy` over the epochs, in training and on the validation images.

    Where an epoch's parts were noted, training is drawn part by part.
    """
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 30 else ""
    noted = bool(history) and all("parts" in row for row in history)
    if noted:
        column = ("loss", "accuracy").index(key) + 1
        x = [row["epoch"] - 1 + part[0] for row in history for part in row["parts"]]
        y = [part[column] for row in history for part in row["parts"]]
    else:
        x, y = epochs, [row[key] for row in history]
    ax.plot(x, y, color=TRAIN, marker=marker, ms=3, label="training")
    validation = [row[f"val_{key}"] for row in history]
    if validation and validation[0] is not None:
        ax.plot(epochs, validation, color=VALIDATION, marker=marker, ms=3, label="validation")
    ax.set(xlabel="epoch", ylabel=key)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(
        0 if noted else min(epochs, default=1) - 0.5,
        max(epochs, default=1) + (0.02 if noted else 0.5),
    )
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return ax


def draw_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy over the epochs, side by side."""
    fig = figure(9, 3.6)
    for ax, key in zip(fig.subplots(1, 2), ("loss", "accuracy"), strict=True):
        plot_curve(ax, history, key)
    return fig


def plot_confusion(ax: Axes, evaluation: "Evaluation") -> Axes:
    """Draw the confusion matrix; shades are shares of a label's images, figures are counts."""
    counts = evaluation.confusion
    k = len(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if k <= 20:
        for i, j in np.ndindex(k, k):
            if counts[i, j]:
                color = "white" if share[i, j] > 0.5 else "black"
                ax.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7, color=color)
    ax.set_xticks(range(k), names(evaluation.class_names), rotation=45, ha="right")
    ax.set_yticks(range(k), names(evaluation.class_names))
    ax.set(xlabel="answer", ylabel="label")
    return ax


def plot_risk_coverage(ax: Axes, evaluation: "Evaluation") -> Axes:
    """Draw the accuracy of the surest answers against how many are given.

    On the test pictures, and on the held-out ones by which a rate is chosen; a dot is what the run
    answers by default.
    """
    curve = evaluation.curve
    ax.plot(curve.coverage, curve.accuracy, color=VALIDATION, lw=1.5, label="test pictures")
    if evaluation.doubt is not None:
        held = evaluation.doubt.curve
        ax.plot(held.coverage, held.accuracy, color=TRAIN, lw=1, label="held-out pictures")
        chosen = evaluation.answered()
        if chosen.any():
            at = chosen.mean(), evaluation.right[chosen].mean()
            ax.plot(*at, "o", color=VALIDATION, ms=6, label="answered by default")
    lowest = min(evaluation.accuracy, float(curve.accuracy.min()) if curve.total > 200 else 1)
    ax.set(xlim=(0, 1.01), ylim=(max(0, min(lowest, 0.9) - 0.05), 1.005))
    ax.set(xlabel="share of pictures answered, surest first", ylabel="accuracy of those answered")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, loc="lower left", fontsize=8)
    return ax


def plot_calibration(
    ax: Axes, calibration: "Calibration", before: "Calibration | None" = None
) -> Axes:
    """Draw accuracy against confidence; on the dashed line they agree.

    before: without the temperature, drawn as grey rings.
    """
    bins = len(calibration.count)
    some = calibration.count > 0
    centers = (np.arange(bins) + 0.5) / bins
    ax.bar(centers[some], calibration.accuracy[some], width=0.9 / bins, color="#9db8d9")
    ax.plot(calibration.confidence[some], calibration.accuracy[some], "o", ms=4, color=VALIDATION)
    if before is not None:
        ring = before.count > 0
        ax.plot(before.confidence[ring], before.accuracy[ring], "o", ms=5, mfc="none", color=TRAIN)
    ax.plot([0, 1], [0, 1], "--", color="#555", lw=1)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the answer", ylabel="accuracy")
    title = f"expected calibration error {calibration.error:.3f}"
    if before is not None:
        title = f"calibration error {calibration.error:.3f}, {before.error:.3f} before (rings)"
    ax.set_title(title, fontsize=9)
    return ax


def draw_pictures(images: NDArray[np.uint8], captions: list[str], *, columns: int = 8) -> Figure:
    """Show images (N, H, W, 3) in a grid with a caption under each."""
    rows = max(1, -(-len(images) // columns))
    lines = 1 + max((caption.count("\n") for caption in captions), default=0)
    fig = figure(1.35 * columns, (1.4 + 0.13 * lines) * rows)
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)  # `.flat` can be walked once only
    for ax in axes:
        ax.axis("off")
    for ax, image, caption in zip(axes, images, captions, strict=False):
        ax.imshow(image, interpolation="nearest")
        ax.text(0.5, -0.04, caption, fontsize=7, ha="center", va="top", transform=ax.transAxes)
    return fig


def draw_mistakes(evaluation: "Evaluation", images: NDArray[np.uint8]) -> Figure:
    """The 24 surest mistakes: label → answer, and its probability."""
    indices = evaluation.surest_mistakes()
    return draw_pictures(images[indices], [_caption(evaluation, i) for i in indices])


def _caption(evaluation: "Evaluation", index: int) -> str:
    answer = evaluation.predictions[index]
    label, answered = names(evaluation.class_names[i] for i in (evaluation.labels[index], answer))
    where = f"#{index}"
    if evaluation.files is not None:
        file = evaluation.files[index]
        if len(file) > LONGEST_TICK:  # its end tells files apart
            file = f"…{file[1 - LONGEST_TICK :]}"
        (where,) = names([file])
    return f"{label}\n→ {answered} {evaluation.probabilities[index, answer]:.1%}\n{where}"
