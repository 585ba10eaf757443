"""How the learning rate changes over a training. A schedule is a formula and its numbers."""

from dataclasses import dataclass, field
from typing import ClassVar

from normlab.recipes.settings import in_range, setting

_SHARE = {"allowed": in_range(0, 1), "remedy": "choose a share in [0, 1]"}
_PEAK = {"allowed": in_range(0, 1, low_open=True, high_open=True), "remedy": "choose in (0, 1)"}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same rate at every step."""

    name: ClassVar[str] = "constant"

    def share(self, done: float) -> float:
        """Share of the learning rate after the share `done` of the steps."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Triangle:
    """Straight up from `start` to 1 at `peak`, straight down to `end`."""

    name: ClassVar[str] = "triangle"
    start: float = setting(0.2, "First share of the rate.", name="schedule_start", **_SHARE)
    peak: float = setting(
        0.23, "Share of the steps at which the rate is highest.", name="schedule_peak", **_PEAK
    )
    end: float = setting(0.07, "Last share of the rate.", name="schedule_end", **_SHARE)

    def share(self, done: float) -> float:
        """Share of the learning rate after the share `done` of the steps.

        >>> [round(Triangle().share(t), 3) for t in (0, 0.115, 0.23, 0.615, 1)]
        [0.2, 0.6, 1.0, 0.535, 0.07]
        """
        if done < self.peak:
            return self.start + (1 - self.start) * done / self.peak
        return self.end + (1 - self.end) * (1 - done) / (1 - self.peak)


@dataclass(frozen=True, kw_only=True)
class ToZero(Triangle):
    """As `Triangle`, but down to 0.

    >>> [round(ToZero().share(t), 3) for t in (0, 0.115, 0.23, 0.615, 1)]
    [0.2, 0.6, 1.0, 0.5, 0.0]
    """

    name: ClassVar[str] = "to_zero"
    end: float = field(default=0.0, init=False)


Schedule = Constant | Triangle
SCHEDULES: dict[str, type[Schedule]] = {kind.name: kind for kind in (Constant, Triangle, ToZero)}
