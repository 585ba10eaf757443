"""What every study fixes before its first run: arms, pairs, contrasts, and when it may decide.

A study's runs may be trainings of a recipe (`study.design`), commands or functions
(`study.measured`). Each kind has its own plan, its own outcomes and its own `Study`; all else is
the same and stands here, in `study.judged`, `study.engine` and `study.runner`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

from normlab.core.files import write_json
from normlab.core.records import read_json
from normlab.errors import DataError, UserError
from normlab.statistics import Measure, level_of_look, smallest_p
from normlab.statistics.sign_flip import EXACT_PAIRS
from normlab.study.arms import Arm

FILE = "study.json"
# Where the plan of each kind of study is; one without a kind is of a recipe.
KINDS = {"recipe": "normlab.study.design", "measured": "normlab.study.measured"}
MOST_PAIRS = 10_000  # a file that asks for more would keep its reader busy for ever
TUNING_SEED = 1_000_000_000  # tuning runs draw from here on, pairs from below


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study's plan, as far as all kinds have it.

    Attributes:
        seeds: how many pairs; it may grow.
        looks: numbers of pairs that were complete, and could be seen, when `seeds` grew.
        contrasts: (first, other) arms, named beforehand; differences are first minus other.
        margin: what counts as no difference, in the measure's unit; None if nothing does.
        threads: of each run; 0 for as many as a command likes.
        environment: where the study began; every run notes its own.
    """

    kind: ClassVar[str]
    arms: tuple[Arm, ...]
    contrasts: tuple[tuple[str, str], ...]
    seeds: int
    first_seed: int
    margin: float | None
    threads: int
    environment: dict[str, Any]
    looks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        last = self.first_seed + self.seeds
        check(
            (self.seeds >= 1, f"seeds={self.seeds}: choose 1 or more; a verdict needs at least 6"),
            (self.first_seed >= 0, f"first_seed={self.first_seed}: choose 0 or more"),
            (self.seeds <= MOST_PAIRS, f"seeds={self.seeds}: choose at most {MOST_PAIRS:,}"),
            (last <= TUNING_SEED, f"seeds up to {last}: stay below {TUNING_SEED:,}"),
        )
        for contrast in self.contrasts:
            for name in contrast:
                if name not in self.arm_names:
                    known = ", ".join(self.arm_names)
                    raise UserError(f"contrast {','.join(contrast)}: {name!r} is no arm of {known}")
            if contrast[0] == contrast[1]:
                raise UserError(f"contrast {','.join(contrast)}: name two different arms")

    @property
    def title(self) -> str:
        """What the runs are, in a word or two."""
        raise NotImplementedError

    @property
    def measure(self) -> Measure:
        """What decides."""
        raise NotImplementedError

    def value(self, outcome: Any) -> float:
        """What a run counts as in `measure`."""
        raise NotImplementedError

    def at_chance(self, outcome: Any) -> bool:
        """Whether a run that ended is not shown to answer better than chance, where that is known.

        Its loss may still be lower than that of a run which is right more often, and too sure.
        """
        return False

    def load_outcome(self, folder: Path, arm: Arm, seed: int) -> Any:
        """The outcome of a run in `folder`; None if it is not there.

        Raises:
            DataError: it is damaged, or is none of this plan's.
        """
        raise NotImplementedError

    def differences(self, asked: Self) -> list[str]:
        """What differs between this plan, of a folder, and the one asked for, but for seeds."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        return {
            "kind": self.kind,
            **vars(self),
            "arms": [arm.as_dict() for arm in self.arms],
        }

    @property
    def arm_names(self) -> tuple[str, ...]:
        return tuple(arm.name for arm in self.arms)

    @property
    def look(self) -> int:
        """Which look the study's next report is, from 1."""
        return len(self.looks) + 1

    @property
    def pair_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)

    def extended(self, seeds: int, pairs_seen: int) -> Self:
        """The same study with more seeds, asked for when `pairs_seen` pairs were complete.

        Two pairs seen or more count as a look, even if they are too few to name a winner: who adds
        pairs unless the first ones agree has two chances, and the level must pay for both.

        Raises:
            UserError: fewer seeds, which would let a study stop where it likes.
        """
        if seeds < self.seeds:
            raise UserError(
                f"seeds={seeds}: this study was planned with {self.seeds}, and seeds can only be "
                "added: stopping early where the figures please would make them worthless"
            )
        new = pairs_seen > max(self.looks, default=1)  # one pair has nothing to agree with
        return replace(self, seeds=seeds, looks=(*self.looks, pairs_seen) if new else self.looks)


def check(*requirements: tuple[bool, str]) -> None:
    """Raise `UserError` with the problem of the first requirement that is not met."""
    for ok, problem in requirements:
        if not ok:
            raise UserError(problem)


def enough_pairs(contrasts: int, look: int = 1) -> int:
    """The smallest number of pairs that can decide one of so many contrasts.

    >>> enough_pairs(1), enough_pairs(4), enough_pairs(1, look=2)
    (6, 8, 9)
    """
    level = level_of_look(look) / contrasts  # of Holm's first step
    for pairs in range(1, EXACT_PAIRS + 2):  # beyond, p gets no smaller
        if smallest_p(pairs) <= level:
            return pairs
    raise UserError(
        f"{contrasts} contrasts on look {look}: no number of pairs can decide any more; begin a "
        "study of its own with another --out"
    )


def default_contrasts(arms: Sequence[Arm]) -> tuple[tuple[str, str], ...]:
    """The first arm against each other one."""
    return tuple((arms[0].name, other.name) for other in arms[1:])


def tell_arms(arms: Sequence[Arm]) -> str:
    return "; ".join(f"{arm.name}: {_changes(arm)}" for arm in arms)


def save(folder: Path, plan: Plan) -> None:
    """Write the study's file, atomically."""
    write_json(folder / FILE, plan.as_dict())


def load(folder: Path) -> Any:
    """Read a folder's plan, of whatever kind; None if it has none.

    Raises:
        DataError: the file is not one that normlab wrote.
    """
    path = folder / FILE
    if not path.exists():
        return None
    values = read_json(path)
    home = KINDS.get(str(values.get("kind", "recipe")))
    if home is None:
        raise DataError(f"{path} is a study of a kind that this release does not know: update it")
    try:
        return import_module(home).read_plan(values)
    except UserError as e:
        raise DataError(f"{path} is not a study's plan ({e}): choose another --out") from None


def _changes(arm: Arm) -> str:
    changes = arm.changes | ({"seed_offset": arm.seed_offset} if arm.seed_offset else {})
    return ", ".join(f"{k}={v}" for k, v in changes.items())
