"""What is fixed before the first run of a study, and the file that holds it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normlab.core.files import write_json
from normlab.core.records import read_json, typed
from normlab.errors import DataError, UserError
from normlab.recipes import Recipe
from normlab.runs import Task
from normlab.statistics import level_of_look, smallest_p
from normlab.statistics.sign_flip import EXACT_PAIRS
from normlab.study.arms import Arm

FILE = "study.json"
# What a plan can ask for; a file that asks for more would keep its reader busy for ever.
MOST_PAIRS, MOST_CHECKS = 10_000, 10_000
TUNING_SEED = 1_000_000_000  # tuning runs draw from here on, pairs from below
OUTCOMES = {
    "primary": "test accuracy after the last epoch; this alone decides",
    "secondary": [
        "test loss after the last epoch",
        "area under the validation accuracy over the steps, as a mean",
        "steps until given validation accuracies",
        "steps until the mean validation accuracy that each contrast's other arm has at its end",
        "median seconds a training step",
    ],
    "divergence": "a loss, or answers to the test images, that are not finite; such a run scores "
    "accuracy 1/K, loss log K and never reaches an accuracy; it is never dropped",
}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How each arm's own value of one setting was chosen before the study, on validation images.

    Attributes:
        setting: a field of `Recipe`, multiplied by each factor.
        scores: mean validation accuracy after the last epoch, by arm, one a factor.
        chosen: the factor of each arm; empty until all trials are done.
    """

    setting: str
    factors: tuple[float, ...]
    seeds: int
    scores: dict[str, list[float]]
    chosen: dict[str, float]

    def edges(self) -> list[str]:
        """Arms whose choice is the smallest or largest factor: better ones may lie beyond."""
        outer = (min(self.factors), max(self.factors))
        return [arm for arm, factor in self.chosen.items() if factor in outer]


@dataclass(frozen=True, kw_only=True)
class Design:
    """A study's plan.

    Attributes:
        seeds: how many pairs; it may grow.
        looks: numbers of pairs that were complete when `seeds` grew, and could have decided.
        contrasts: (first, other) arms, named beforehand; differences are first minus other.
        margin: what counts as no difference, a fraction of accuracy.
        thresholds: validation accuracies whose steps are counted.
        checks: at least so many checks of validation accuracy a run, evenly spread.
        environment: where the study began; every run notes its own.
        data_name: what the data are called, wherever they lie; empty in studies before 0.2.
    """

    recipe: Recipe
    arms: tuple[Arm, ...]
    contrasts: tuple[tuple[str, str], ...]
    seeds: int
    first_seed: int
    margin: float
    thresholds: tuple[float, ...]
    checks: int
    threads: int
    data: str
    data_sha256: str
    class_names: tuple[str, ...]
    image_size: int
    train_images: int
    test_images: int
    environment: dict[str, Any]
    data_name: str = ""
    skip_bad: bool = False
    tuning: Tuning | None = None
    looks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        last = self.first_seed + self.seeds
        for ok, problem in (
            (self.seeds >= 1, f"seeds={self.seeds}: choose 1 or more; a verdict needs at least 6"),
            (self.first_seed >= 0, f"first_seed={self.first_seed}: choose 0 or more"),
            (self.seeds <= MOST_PAIRS, f"seeds={self.seeds}: choose at most {MOST_PAIRS:,}"),
            (self.checks <= MOST_CHECKS, f"checks={self.checks}: choose at most {MOST_CHECKS:,}"),
            (last <= TUNING_SEED, f"seeds up to {last}: stay below {TUNING_SEED:,}"),
            (0 < self.margin < 1, f"margin={self.margin}: choose a fraction such as 0.005"),
            (self.checks >= 1, f"checks={self.checks}: choose 1 or more"),
            (
                all(0 < t < 1 for t in self.thresholds),
                f"thresholds={', '.join(map(str, self.thresholds))}: choose fractions in (0, 1)",
            ),
        ):
            if not ok:
                raise UserError(problem)
        for contrast in self.contrasts:
            for name in contrast:
                if name not in self.arm_names:
                    known = ", ".join(self.arm_names)
                    raise UserError(f"contrast {','.join(contrast)}: {name!r} is no arm of {known}")
            if contrast[0] == contrast[1]:
                raise UserError(f"contrast {','.join(contrast)}: name two different arms")

    @property
    def arm_names(self) -> tuple[str, ...]:
        return tuple(arm.name for arm in self.arms)

    @property
    def look(self) -> int:
        """Which look the study's next report is, from 1."""
        return len(self.looks) + 1

    def task(self, arm: Arm, seed: int) -> Task:
        """What one run trains: the arm's recipe, tuned, with the pair's seed."""
        recipe = arm.recipe(self.recipe)
        if self.tuning is not None and arm.name in self.tuning.chosen:
            recipe = scaled(recipe, self.tuning.setting, self.tuning.chosen[arm.name])
        return Task(
            recipe=recipe,
            seed=seed + arm.seed_offset,
            data=self.data,
            data_sha256=self.data_sha256,
            class_names=self.class_names,
            image_size=self.image_size,
            skip_bad=self.skip_bad,
        )

    def extended(self, seeds: int, pairs_seen: int) -> "Design":
        """The same study with more seeds, asked for when `pairs_seen` pairs were complete.

        The pairs seen count as a look if they could have named a winner: else nothing could be
        learned from them that the level must pay for.

        Raises:
            UserError: fewer seeds, which would let a study stop where it likes.
        """
        if seeds < self.seeds:
            raise UserError(
                f"seeds={seeds}: this study was planned with {self.seeds}, and seeds can only be "
                "added: stopping early where the figures please would make them worthless"
            )
        could_decide = pairs_seen >= enough_pairs(len(self.contrasts), self.look)
        return replace(
            self, seeds=seeds, looks=(*self.looks, pairs_seen) if could_decide else self.looks
        )

    def as_dict(self) -> dict[str, Any]:
        tuning = None if self.tuning is None else vars(self.tuning)
        return {
            **vars(self),
            "recipe": self.recipe.as_dict(),
            "arms": [arm.as_dict() for arm in self.arms],
            "tuning": tuning,
            "outcomes": OUTCOMES,
        }


def scaled(recipe: Recipe, setting: str, factor: float) -> Recipe:
    """`recipe` with one setting multiplied."""
    return recipe.with_settings({setting: recipe.settings()[setting] * factor})


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


def differences(then: Design, now: Design) -> list[str]:
    """What differs between the plan in a folder and the one asked for, seeds and looks aside."""
    was, asked = then.as_dict(), now.as_dict()
    found = []
    for key in was:
        if key in ("seeds", "looks", "data", "data_name", "environment", "outcomes"):
            continue
        if key == "recipe":
            old, new = then.recipe.settings(), now.recipe.settings()
            found += [
                f"{k} ({old.get(k)} then, {new.get(k)} now)"
                for k in {**old, **new}
                if old.get(k) != new.get(k)
            ]
        elif key == "arms" and was[key] != asked[key]:
            found.append(f"arms ({_tell(then.arms)} then, {_tell(now.arms)} now)")
        elif key == "tuning":
            if _trials(then.tuning) != _trials(now.tuning):
                found.append(f"tune ({_trials(then.tuning)} then, {_trials(now.tuning)} now)")
        elif was[key] != asked[key]:
            found.append(f"{key} ({_short(was[key])} then, {_short(asked[key])} now)")
    return found


def save(folder: Path, design: Design) -> None:
    """Write the study's file, atomically."""
    write_json(folder / FILE, design.as_dict())


def load(folder: Path) -> Design | None:
    """Read a folder's plan; None if it has none.

    Raises:
        DataError: the file is not one that normlab wrote.
    """
    path = folder / FILE
    if not path.exists():
        return None
    values = read_json(path)
    try:
        return typed(values, Design, "it", recipe=Recipe.from_dict(values.get("recipe")))
    except UserError as e:
        raise DataError(f"{path} is not a study's plan ({e}): choose another --out") from None


def _tell(arms: Sequence[Arm]) -> str:
    return "; ".join(f"{arm.name}: {_changes(arm)}" for arm in arms)


def _changes(arm: Arm) -> str:
    changes = arm.changes | ({"seed_offset": arm.seed_offset} if arm.seed_offset else {})
    return ", ".join(f"{k}={v}" for k, v in changes.items())


def _trials(tuning: Tuning | None) -> str:
    if tuning is None:
        return "none"
    return f"{tuning.setting}={','.join(f'{f:g}' for f in tuning.factors)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
