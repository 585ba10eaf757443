"""Would more pictures help? Accuracies at several numbers of pictures, and what they lead to."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

LITTLE = 0.005  # half a point of accuracy: less is not worth collecting for


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        share: of the training pictures.
        pictures: how many these are.
        right, total: of the test pictures.
        run: its folder.
    """

    share: float
    pictures: int
    seed: int
    right: int
    total: int
    run: str = ""

    @property
    def accuracy(self) -> float:
        return self.right / self.total

    @property
    def error(self) -> float:
        """Share of wrong answers, half a picture added so that it is never 0."""
        return (self.total - self.right + 0.5) / (self.total + 1)


@dataclass(frozen=True)
class Expected:
    """What a number of pictures is expected to give.

    Attributes:
        accuracy: what the fitted line has there.
        low, high: an interval for one more training, 95 %; equal to `accuracy` where two trainings
            leave no spread.
    """

    pictures: int
    accuracy: float
    low: float
    high: float


def extrapolate(points: Sequence[Point], pictures: int) -> Expected:
    """Continue error = a·n^−b, fitted to all trainings by least squares of the logarithms.

    Such power laws describe errors over wide ranges of n (Hestness et al. 2017, arXiv 1712.00409);
    they know no floor, so they promise too much where the labels themselves are wrong. The interval
    is that of one more observation of this regression, with Student's t.

    Args:
        points: at two numbers of pictures or more.
    """
    x, y = np.log([p.pictures for p in points]), np.log([p.error for p in points])
    away, spread = math.log(pictures) - x.mean(), float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    falls = slope < 0  # errors that rise with more pictures are taken for level
    slope = min(slope, 0.0)
    middle = float(y.mean() + slope * away)
    free = len(points) - 1 - falls
    half = 0.0
    if free > 0:
        rest = y - y.mean() - slope * (x - x.mean())
        variance = float((rest**2).sum()) / free
        leverage = 1 / len(points) + (away**2 / spread if falls else 0.0)
        half = float(student.ppf(0.975, free)) * math.sqrt(variance * (1 + leverage))
    low, accuracy, high = (1 - min(1.0, math.exp(middle + d)) for d in (half, 0.0, -half))
    return Expected(pictures, accuracy, low, high)


@dataclass(frozen=True)
class LearningCurve:
    """Trainings on parts of the training pictures, all for as many steps, with one test set."""

    recipe: str
    data: str
    points: tuple[Point, ...]

    @property
    def sizes(self) -> list[tuple[int, list[Point]]]:
        """Numbers of pictures, rising, with their trainings."""
        numbers = sorted({p.pictures for p in self.points})
        return [(n, [p for p in self.points if p.pictures == n]) for n in numbers]

    @property
    def doubled(self) -> Expected:
        """With twice as many pictures as there are."""
        return extrapolate(self.points, 2 * self.sizes[-1][0])

    @property
    def gain(self) -> tuple[float, float, float]:
        """Of twice as many pictures: expected, lowest and highest, as fractions."""
        now = float(np.mean([p.accuracy for p in self.sizes[-1][1]]))
        twice = self.doubled
        return twice.accuracy - now, twice.low - now, twice.high - now

    def answer(self) -> str:
        """Whether more pictures would help, in a sentence."""
        gain, low, high = self.gain
        n = self.sizes[-1][0]
        told = (
            f"twice as many ({2 * n:,}) would give about {100 * self.doubled.accuracy:.1f} %, "
            f"{100 * gain:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        )
        if low > LITTLE:
            return f"Yes, more pictures would help: {told}"
        if high < LITTLE:
            return f"Hardly: {told}; look at the mistakes and labels instead"
        if gain > LITTLE:
            return f"Perhaps: {told}; more seeds would tell"
        return f"It cannot be said: {told}; more seeds would tell"

    def lines(self) -> list[str]:
        """The table and the answer, for a terminal."""
        rows = ["pictures   accuracy (mean, lowest and highest seed)"]
        for n, points in self.sizes:
            a = [p.accuracy for p in points]
            rows.append(f"{n:>8,}   {np.mean(a):.4f}   {min(a):.4f} to {max(a):.4f}   n = {len(a)}")
        return [*rows, self.answer() + "."]

    def as_dict(self) -> dict[str, Any]:
        gain, low, high = self.gain
        return {
            "recipe": self.recipe,
            "data": self.data,
            "points": [{**asdict(p), "accuracy": p.accuracy} for p in self.points],
            "doubled": asdict(self.doubled),
            "gain": {"expected": gain, "low": low, "high": high},
            "answer": self.answer(),
        }
