"""The drawing of a learning curve."""

import numpy as np
from matplotlib.figure import Figure

from normlab.reports import plots
from normlab.study.learning_curve import LearningCurve, extrapolate


def draw_learning_curve(curve: LearningCurve) -> Figure:
    """Accuracy over the number of pictures, every seed a dot, and where it leads."""
    fig = plots.figure(6, 4)
    ax = fig.subplots()
    for seed in sorted({p.seed for p in curve.points}):
        mine = sorted((p.pictures, p.accuracy) for p in curve.points if p.seed == seed)
        ax.plot(*zip(*mine, strict=True), "o", ms=4, color=plots.TRAIN, alpha=0.8)
    sizes = [n for n, _ in curve.sizes]
    means = [float(np.mean([p.accuracy for p in points])) for _, points in curve.sizes]
    ax.plot(sizes, means, color=plots.VALIDATION, label="mean of the seeds")
    ahead = np.geomspace(sizes[0], 2 * sizes[-1], 40).astype(int)
    expected = [extrapolate(curve.points, int(n)) for n in ahead]
    ax.plot(ahead, [e.accuracy for e in expected], "--", color=plots.VALIDATION, lw=1)
    later = [(n, e) for n, e in zip(ahead, expected, strict=True) if n >= sizes[-1]]
    ax.fill_between(
        [n for n, _ in later],
        [e.low for _, e in later],
        [e.high for _, e in later],
        color=plots.VALIDATION,
        alpha=0.15,
        label="expected of one more training, 95 %",
    )
    ax.set_xscale("log", base=2)
    ax.set_xticks([*sizes, 2 * sizes[-1]], [f"{n:,}" for n in (*sizes, 2 * sizes[-1])])
    ax.minorticks_off()
    ax.set(xlabel="training pictures", ylabel="test accuracy")
    ax.set_title(plots.named(f"{curve.recipe} on {curve.data}"), fontsize=10)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, loc="lower right", fontsize=8)
    return fig
