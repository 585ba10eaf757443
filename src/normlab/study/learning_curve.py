"""Would more pictures help? Accuracies at several numbers of pictures, and what they lead to."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f as fisher
from scipy.stats import t as student

FLOORS = np.linspace(0, 0.98, 50)  # of the smallest error
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
    """Continue error = a·n^−b + c, fitted to all trainings by least squares of the logarithms.

    Such laws describe errors over wide ranges of n (Hestness et al. 2017, arXiv 1712.00409). c is
    what no number of pictures brings below: wrong labels, too small a network, too few steps. Two
    sizes, or three trainings, do not tell it, so c = 0 is the estimate there, and every other c is
    possible. The interval spans those of one more training over all c that the errors allow (an F
    test, 95 %), with Student's t.

    Args:
        points: at two numbers of pictures or more.
    """
    x, errors = np.log([p.pictures for p in points]), np.array([p.error for p in points])
    fits = [_through(x, errors, c, math.log(pictures)) for c in FLOORS * errors.min()]
    told = len(points) > 3 and len(set(x.tolist())) > 2
    free = len(points) - (3 if told else 2)
    best, possible = fits[0], fits
    if told:
        best = min(fits, key=lambda fit: fit.squares)
        limit = best.squares * (1 + fisher.ppf(0.95, 1, free) / free)
        possible = [fit for fit in fits if fit.squares <= limit]
    if free < 1:
        return Expected(pictures, *[1 - best.error] * 3)
    t = float(student.ppf(0.975, free))
    half = [t * math.sqrt(fit.squares / free * (1 + fit.leverage)) for fit in possible]
    ends = list(zip(possible, half, strict=True))
    few = min(fit.error * math.exp(-h) for fit, h in ends)
    most = max(fit.error * math.exp(h) for fit, h in ends)
    last = errors[x == x.max()]  # more pictures do no harm: no worse than one more training there
    spread = math.sqrt(best.squares / free * (1 + 1 / len(last)))
    now = float(np.exp(np.log(last).mean() + t * spread))
    most = max(best.error, min(most, now, 1.0))
    return Expected(pictures, 1 - best.error, 1 - most, 1 - few)


@dataclass(frozen=True)
class _Fit:
    """A curve with a given floor.

    error: where it is asked for; squares: of the residuals of log error; leverage: of that place.
    """

    error: float
    squares: float
    leverage: float


def _through(x: NDArray[np.float64], errors: NDArray[np.float64], floor: float, at: float) -> _Fit:
    """log(error − floor) as a falling line of `x`; errors that rise are taken for level."""
    y = np.log(errors - floor)
    away, spread = at - x.mean(), float(((x - x.mean()) ** 2).sum())
    slope = min(0.0, float(((x - x.mean()) * (y - y.mean())).sum() / spread))
    fitted = floor + np.exp(y.mean() + slope * (x - x.mean()))
    return _Fit(
        error=floor + math.exp(float(y.mean()) + slope * away),
        squares=float(((np.log(errors) - np.log(fitted)) ** 2).sum()),
        leverage=1 / len(x) + (away**2 / spread if slope < 0 else 0.0),
    )


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
        if len(self.points) < 3:  # two trainings have a line between them, and no spread
            return "It cannot be said of two trainings: more seeds or sizes would tell"
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
