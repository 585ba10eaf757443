"""A study's outcomes judged: a frozen result, computed before anything is drawn."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from normlab.core.streams import stream
from normlab.errors import UserError
from normlab.evaluation.evaluation import limits_of
from normlab.statistics import (
    Comparison,
    Contrast,
    Description,
    McNemar,
    describe,
    judge,
    mcnemar,
)
from normlab.study import outcomes as runs
from normlab.study.arms import Arm
from normlab.study.design import Design, load
from normlab.study.outcomes import Outcome

RUNS = "runs"
TUNING = "tuning"
USUAL_LEVEL = 0.05  # of intervals that decide nothing

Pair = tuple[Outcome, Outcome]


@dataclass(frozen=True)
class Study:
    """A study's folder, opened.

        study = normlab.compare("fast79", arms=["batch", "none"], seeds=6)
        study.comparisons[0].sentence

    Attributes:
        path: the folder.
        outcomes: of the finished runs, arm by arm, seed by seed.
        given_up: why runs were given up in this session, by their names.
    """

    path: Path
    design: Design
    outcomes: tuple[Outcome, ...]
    given_up: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Runs that the plan asks for."""
        return self.design.seeds * len(self.design.arms)

    @property
    def complete(self) -> bool:
        return len(self.outcomes) == self.total

    def arm(self, name: str) -> dict[int, Outcome]:
        """Finished runs of one arm by seed."""
        return {o.seed: o for o in self.outcomes if o.arm == name}

    def pairs(self, first: str, other: str) -> list[Pair]:
        """Finished pairs in the order of their seeds."""
        a, b = self.arm(first), self.arm(other)
        return [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]

    @property
    def pairs_seen(self) -> int:
        """Finished pairs of the contrast that has most."""
        return max(len(self.pairs(*contrast)) for contrast in self.design.contrasts)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The verdicts, one a contrast.

        Raises:
            UserError: runs are missing. Half a study has no verdict, whatever it looks like.
        """
        if not self.complete:
            raise UserError(
                f"study {str(self.path)!r} has {len(self.outcomes)} of {self.total} runs: it has "
                "no verdict before all are done; the command that began it goes on"
            )
        contrasts = [
            Contrast(
                first,
                other,
                differences(self.pairs(first, other)),
                diverged=(_diverged(self.arm(first)), _diverged(self.arm(other))),
            )
            for first, other in self.design.contrasts
        ]
        generator = stream(self.design.first_seed, "study", "flips", self.design.seeds)
        return tuple(
            judge(
                contrasts,
                look=self.design.look,
                generator=generator,
                margin=self.design.margin,
            )
        )

    @cached_property
    def descriptions(self) -> tuple[Description, ...]:
        """What stands beside each comparison and decides nothing."""
        generator = stream(self.design.first_seed, "study", "bootstrap", self.design.seeds)
        return tuple(
            describe(differences(self.pairs(c.first, c.other)), level=c.level, generator=generator)
            for c in self.comparisons
        )

    def mcnemar(self, pair: Pair) -> McNemar | None:
        """Two sets of weights on the same test images; None if one of them diverged."""
        first, other = pair
        if first.diverged or other.diverged:
            return None
        count = self.design.test_images
        return mcnemar(first.correct(count), other.correct(count))

    def so_far(self, first: str, other: str) -> Description | None:
        """The pairs so far described; None for less than two. It is no look and decides nothing."""
        d = differences(self.pairs(first, other))
        if len(d) < 2:
            return None
        return describe(d, level=USUAL_LEVEL, generator=stream(0, "so far"))

    @cached_property
    def summaries(self) -> tuple[dict[str, Any], ...]:
        """Each arm's outcomes over its runs."""
        return tuple(self._summary(arm) for arm in self.design.arms)

    def _summary(self, arm: Arm) -> dict[str, Any]:
        found = list(self.arm(arm.name).values())
        accuracies = [o.accuracy for o in found]
        areas = [o.area for o in found if o.area is not None]
        seconds = [o.step_seconds for o in found if o.step_seconds is not None]
        return {
            "name": arm.name,
            "n": len(found),
            "test_accuracy": _mean(accuracies),
            "test_accuracy_sd": float(np.std(accuracies, ddof=1)) if len(found) > 1 else None,
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

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The different ones that the runs were made in."""
        found = {str(o.environment): o.environment for o in self.outcomes}
        return list(found.values())

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON; accuracies and differences are fractions."""
        return {
            "study": str(self.path),
            "complete": self.complete,
            "runs": len(self.outcomes),
            "look": self.design.look,
            "comparisons": [asdict(c) for c in self.comparisons] if self.complete else [],
            "arms": list(self.summaries),
            "tuning": None if self.design.tuning is None else asdict(self.design.tuning),
            "given_up": self.given_up,
        }


def open_study(path: str | Path, given_up: dict[str, str] | None = None) -> Study:
    """Read a study's folder.

    Raises:
        UserError: it is none.
        DataError: a file in it is damaged.
    """
    folder = Path(path)
    design = load(folder)
    if design is None:
        raise UserError(
            f"{str(folder)!r} holds no study: name a folder that `normlab compare` made"
        )
    found = [
        runs.load(folder / RUNS, design.task(arm, seed), arm.name, seed)
        for arm in design.arms
        for seed in range(design.first_seed, design.first_seed + design.seeds)
    ]
    return Study(folder, design, tuple(o for o in found if o is not None), given_up or {})


def differences(pairs: list[Pair]) -> list[float]:
    """Test accuracy of first minus other, pair by pair; whole images over N, so ties stay ties."""
    return [round(first.accuracy - other.accuracy, 12) for first, other in pairs]


def _diverged(arm: dict[int, Outcome]) -> int:
    return sum(o.diverged is not None for o in arm.values())


def _mean(values: list[Any]) -> float | None:
    return float(np.mean(values)) if values else None


def _reached(steps: list[int | None]) -> dict[str, Any]:
    """How many runs reached it, and the median step, never counting as later than any step."""
    ordered = sorted(steps, key=lambda s: float("inf") if s is None else s)
    middle = ordered[(len(ordered) - 1) // 2] if ordered else None
    return {"reached": sum(s is not None for s in steps), "median_steps": middle}
