"""A study of a recipe, its runs' outcomes judged and told arm by arm."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from normlab.evaluation.evaluation import limits_of
from normlab.statistics import McNemar, mcnemar
from normlab.study.arms import Arm
from normlab.study.design import Design
from normlab.study.judged import Judged
from normlab.study.outcomes import Outcome

Pair = tuple[Outcome, Outcome]


@dataclass(frozen=True)
class Study(Judged):
    """A study's folder, opened.

    study = normlab.compare("fast79", arms=["batch", "none"], seeds=6)
    study.comparisons[0].sentence
    """

    design: Design
    outcomes: tuple[Outcome, ...]

    def mcnemar(self, pair: Pair) -> McNemar | None:
        """Two sets of weights on the same test images; None if one of them diverged."""
        first, other = pair
        if first.diverged or other.diverged:
            return None
        count = self.design.test_images
        return mcnemar(first.correct(count), other.correct(count))

    @cached_property
    def summaries(self) -> tuple[dict[str, Any], ...]:
        """Each arm's outcomes over its runs."""
        return tuple(self._summary(arm) for arm in self.design.arms)

    def _summary(self, arm: Arm) -> dict[str, Any]:
        found = list(self.arm(arm.name).values())
        accuracies = [o.accuracy for o in found]
        decisive = [self.design.value(o) for o in found]
        areas = [o.area for o in found if o.area is not None]
        seconds = [o.step_seconds for o in found if o.step_seconds is not None]
        return {
            "name": arm.name,
            "n": len(found),
            "test_accuracy": _mean(accuracies),
            "test_accuracy_sd": float(np.std(accuracies, ddof=1)) if len(found) > 1 else None,
            "outcome": _mean(decisive),
            "outcome_sd": float(np.std(decisive, ddof=1)) if len(found) > 1 else None,
            "test_loss": _mean([o.test_loss for o in found]),
            "validation_area": _mean(areas),
            "step_seconds": float(np.median(seconds)) if seconds else None,
            "diverged": sum(o.diverged is not None for o in found),
            "steps_to": {
                f"{t:g}": _reached([o.steps_until(t) for o in found])
                for t in self.design.thresholds
            },
            "steps_to_others_end": {
                other: _reached([o.steps_until(end) for o in found])
                for other, end in self.ends.items()
            },
        }

    @property
    def ends(self) -> dict[str, float]:
        """Mean validation accuracy at the end, of each arm that another is compared with."""
        found = {}
        for other in dict.fromkeys(other for _, other in self.design.contrasts):
            accuracies = [o.val_accuracy for o in self.arm(other).values()]
            if accuracies and None not in accuracies:
                found[other] = _mean(accuracies)
        return {other: end for other, end in found.items() if end is not None}

    @property
    def limits(self) -> tuple[str, ...]:
        """Of the data set."""
        return limits_of(self.design.data_name or self.design.data)

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON; accuracies and differences are fractions."""
        return {
            **super().as_dict(),
            "arms": list(self.summaries),
            "tuning": None if self.design.tuning is None else asdict(self.design.tuning),
            "given_up": self.given_up,
        }


def _mean(values: list[Any]) -> float | None:
    return float(np.mean(values)) if values else None


def _reached(steps: list[int | None]) -> dict[str, Any]:
    """How many runs reached it, and the median step, never counting as later than any step."""
    ordered = sorted(steps, key=lambda s: float("inf") if s is None else s)
    middle = ordered[(len(ordered) - 1) // 2] if ordered else None
    return {"reached": sum(s is not None for s in steps), "median_steps": middle}
