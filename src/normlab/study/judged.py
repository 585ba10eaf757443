"""A study's outcomes judged: a frozen result, computed before anything is drawn."""

import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from normlab.core.machine import told
from normlab.core.streams import stream
from normlab.errors import UserError
from normlab.statistics import Comparison, Contrast, Description, describe, judge
from normlab.study.plan import Plan, load

RUNS = "runs"
STUDIES = {"recipe": "normlab.study.result", "measured": "normlab.study.measured"}
USUAL_LEVEL = 0.05  # of intervals that decide nothing


@dataclass(frozen=True)
class Judged:
    """A study of any kind, its folder opened; each kind has a `Study` of its own.

    Attributes:
        path: the folder.
        outcomes: of the finished runs, arm by arm, seed by seed.
        given_up: why runs were given up in this session, by their names.
    """

    path: Path
    design: Plan
    outcomes: tuple[Any, ...]
    given_up: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Runs that the plan asks for."""
        return self.design.seeds * len(self.design.arms)

    @property
    def complete(self) -> bool:
        return len(self.outcomes) == self.total

    @property
    def decided(self) -> bool:
        """Whether there are verdicts."""
        return self.complete

    def arm(self, name: str) -> dict[int, Any]:
        """Finished runs of one arm by seed."""
        return {o.seed: o for o in self.outcomes if o.arm == name}

    def pairs(self, first: str, other: str) -> list[tuple[Any, Any]]:
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
                self._differences(first, other),
                diverged=(_diverged(self.arm(first)), _diverged(self.arm(other))),
                at_chance=(self._at_chance(first), self._at_chance(other)),
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
                measure=self.design.measure,
            )
        )

    @cached_property
    def descriptions(self) -> tuple[Description, ...]:
        """What stands beside each comparison and decides nothing."""
        generator = stream(self.design.first_seed, "study", "bootstrap", self.design.seeds)
        return tuple(
            describe(self._differences(c.first, c.other), level=c.level, generator=generator)
            for c in self.comparisons
        )

    def so_far(self, first: str, other: str) -> Description | None:
        """The pairs so far described; None for less than two. It is no look and decides nothing."""
        d = self._differences(first, other)
        if len(d) < 2:
            return None
        return describe(d, level=USUAL_LEVEL, generator=stream(0, "so far"))

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The different ones that the runs were made in."""
        found = {str(o.environment): o.environment for o in self.outcomes}
        return list(found.values())

    @property
    def made_with(self) -> list[str]:
        """What a reader is told of the environments, a line each."""
        return list(dict.fromkeys(map(told, self.environments)))

    @property
    def mixture(self) -> list[str]:
        """The same for a terminal where they are several, which pairs then compare, too."""
        return [f"Made with: {line}" for line in self.made_with] if len(self.made_with) > 1 else []

    @property
    def findings(self) -> tuple[str, ...]:
        """Mistakes that the outcomes show, each with its remedy."""
        return ()

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON."""
        return {
            "study": str(self.path),
            "complete": self.complete,
            "runs": len(self.outcomes),
            "look": self.design.look,
            "comparisons": [_plain(c) for c in self.comparisons] if self.decided else [],
            "environments": self.environments,
        }

    def _at_chance(self, arm: str) -> int:
        return sum(map(self.design.at_chance, self.arm(arm).values()))

    def _differences(self, first: str, other: str) -> list[float]:
        """First minus other, pair by pair; rounding is taken off, so that ties stay ties."""
        value = self.design.value
        values = [(value(a), value(b)) for a, b in self.pairs(first, other)]
        largest = max((abs(x) for pair in values for x in pair), default=0.0)
        digits = 12 - (math.floor(math.log10(largest)) if largest else 0)
        return [round(a - b, digits) for a, b in values]


def open_study(path: str | Path, given_up: dict[str, str] | None = None) -> Any:
    """Read a study's folder, of whatever kind.

    Raises:
        UserError: it is none.
        DataError: a file in it is damaged.
    """
    folder = Path(path)
    plan: Plan | None = load(folder)
    if plan is None:
        raise UserError(
            f"{str(folder)!r} holds no study: name a folder that `normlab compare` made"
        )
    found = [
        plan.load_outcome(folder / RUNS, arm, seed) for arm in plan.arms for seed in plan.pair_seeds
    ]
    kind = import_module(STUDIES[plan.kind]).Study
    return kind(folder, plan, tuple(o for o in found if o is not None), given_up or {})


def _plain(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON, which has no infinity: a limit that there is not is null."""
    values = asdict(comparison)
    values["interval"] = [x if math.isfinite(x) else None for x in comparison.interval]
    return values


def _diverged(arm: dict[int, Any]) -> int:
    return sum(o.diverged is not None for o in arm.values())
