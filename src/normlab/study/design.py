"""The plan of a study whose runs are trainings of a recipe."""

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from normlab.core.records import typed
from normlab.errors import UserError
from normlab.recipes import Recipe
from normlab.runs import Start, Task
from normlab.statistics import ACCURACY, Measure, accuracy_interval
from normlab.study import outcomes
from normlab.study.arms import Arm
from normlab.study.plan import Plan, check, tell_arms
from normlab.training.preparation import check_network

MOST_CHECKS = 10_000  # as `plan.MOST_PAIRS`
# What a study may decide by, as its runs' outcomes have it.
MEASURES = {
    "accuracy": ACCURACY,
    "balanced_accuracy": Measure("balanced test accuracy", fraction=True),
    "macro_f1": Measure("test macro-F1", fraction=True),
    "loss": Measure("test loss", lower_is_better=True, diverged_as="as log K"),
}
OUTCOMES = {
    "secondary": [
        "test accuracy, balanced accuracy, macro-F1 and loss after the last epoch",
        "area under the validation accuracy over the steps, as a mean",
        "steps until given validation accuracies",
        "steps until the mean validation accuracy that each contrast's other arm has at its end",
        "median seconds a training step",
    ],
    "divergence": "a loss, or answers to the images that it is scored on, that are not finite; "
    "such a run scores accuracy 1/K, loss log K and never reaches an accuracy; it is never dropped",
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
class Design(Plan):
    """A study's plan.

    Attributes:
        margin: what counts as no difference, a fraction of accuracy; of a loss, in its unit.
        thresholds: validation accuracies whose steps are counted.
        checks: at least so many checks of validation accuracy a run, evenly spread.
        data_name: what the data are called, wherever they lie; empty in studies before 0.2.
        group_by: a pattern of files' names; see `normlab.data.load`.
        outcome: what decides, one of `MEASURES`.
        held_out: share of the training images that the runs are tested on, so that one's own test
            images have no say in what is chosen; 0 for the test images.
        sizes: SHA-256 of the data at each other size of pictures that an arm has.
        starts: how the arms begin that start from a run, by their names.
    """

    kind: ClassVar[str] = "recipe"
    recipe: Recipe
    margin: float
    thresholds: tuple[float, ...]
    checks: int
    data: str
    data_sha256: str
    class_names: tuple[str, ...]
    image_size: int
    train_images: int
    test_images: int
    data_name: str = ""
    skip_bad: bool = False
    group_by: str | None = None
    tuning: Tuning | None = None
    outcome: str = "accuracy"
    held_out: float = 0.0
    sizes: dict[str, str] = field(default_factory=dict)
    starts: dict[str, Start] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        most, below = (math.inf, "") if self.outcome == "loss" else (1.0, " and below 1")
        check(
            (
                self.outcome in MEASURES,
                f"outcome={self.outcome}: choose one of {', '.join(MEASURES)}",
            ),
            (0 <= self.held_out < 1, f"held_out={self.held_out}: choose a share in [0, 1)"),
            (self.checks <= MOST_CHECKS, f"checks={self.checks}: choose at most {MOST_CHECKS:,}"),
            (0 < self.margin < most, f"margin={self.margin}: choose a number above 0{below}"),
            (self.checks >= 1, f"checks={self.checks}: choose 1 or more"),
            (
                all(0 < t < 1 for t in self.thresholds),
                f"thresholds={', '.join(map(str, self.thresholds))}: choose fractions in (0, 1)",
            ),
        )

    @property
    def title(self) -> str:
        return self.recipe.name

    @property
    def measure(self) -> Measure:
        found = MEASURES[self.outcome]
        if not self.held_out:
            return found
        name = found.name.replace("test", "held-out")
        return replace(found, name=name, scope="this training set and these held-out pictures")

    def value(self, outcome: outcomes.Outcome) -> float:
        values = {
            "accuracy": outcome.accuracy,
            "balanced_accuracy": outcome.balanced_accuracy,
            "macro_f1": outcome.macro_f1,
            "loss": outcome.test_loss,
        }
        found = values[self.outcome]
        if found is None:
            raise UserError(
                f"the runs of this study were made before there was {self.outcome}: begin another"
            )
        return found

    def at_chance(self, outcome: outcomes.Outcome) -> bool:
        score = outcome.accuracy if outcome.balanced_accuracy is None else outcome.balanced_accuracy
        lowest, _ = accuracy_interval(round(score * self.test_images), self.test_images)
        return outcome.diverged is None and lowest <= 1 / len(self.class_names)

    def load_outcome(self, folder: Path, arm: Arm, seed: int) -> outcomes.Outcome | None:
        return outcomes.load(folder, self.task(arm, seed), arm.name, seed)

    def task(self, arm: Arm, seed: int) -> Task:
        """What one run trains: the arm's recipe, tuned, with the pair's seed."""
        recipe = arm.recipe(self.recipe)
        if self.tuning is not None and arm.name in self.tuning.chosen:
            recipe = scaled(recipe, self.tuning.setting, self.tuning.chosen[arm.name])
        size = arm.image_size or self.image_size
        return Task(
            recipe=recipe,
            seed=seed + arm.seed_offset,
            data=self.data,
            data_sha256=self.sizes.get(str(size), self.data_sha256),
            class_names=self.class_names,
            image_size=size,
            skip_bad=self.skip_bad,
            group_by=self.group_by,
            start=self.starts.get(arm.name),
        )

    def differences(self, asked: "Design") -> list[str]:
        was, now = self.as_dict(), asked.as_dict()
        found = []
        for key in was:
            if key in ("seeds", "looks", "data", "data_name", "environment", "outcomes"):
                continue
            if key == "recipe":
                old, new = self.recipe.settings(), asked.recipe.settings()
                found += [
                    f"{k} ({old.get(k)} then, {new.get(k)} now)"
                    for k in {**old, **new}
                    if old.get(k) != new.get(k)
                ]
            elif key == "arms" and was[key] != now[key]:
                found.append(f"arms ({tell_arms(self.arms)} then, {tell_arms(asked.arms)} now)")
            elif key == "tuning":
                if _trials(self.tuning) != _trials(asked.tuning):
                    found.append(f"tune ({_trials(self.tuning)} then, {_trials(asked.tuning)} now)")
            elif was[key] != now[key]:
                found.append(f"{key} ({_short(was[key])} then, {_short(now[key])} now)")
        return found

    def as_dict(self) -> dict[str, Any]:
        tuning = None if self.tuning is None else vars(self.tuning)
        return {
            **super().as_dict(),
            "recipe": self.recipe.as_dict(),
            "tuning": tuning,
            "starts": {name: asdict(start) for name, start in self.starts.items()},
            "outcomes": {"primary": f"{self.measure.name} after the last epoch; this alone decides"}
            | OUTCOMES,
        }


def read_plan(values: dict[str, Any]) -> Design:
    """The plan that a study's file holds.

    Raises:
        UserError: it is none, or one that no study can have.
    """
    return typed(values, Design, "it", recipe=Recipe.from_dict(values.get("recipe")))


def check_arm(arm: Arm, base: Recipe, class_names: tuple[str, ...], image_size: int) -> None:
    """Build the arm's network and ask it for an answer, so that what it cannot do is known now.

    Raises:
        UserError: such as `instance` on a layer whose input is a vector.
    """
    task = Task(
        recipe=arm.recipe(base),
        seed=0,
        data="",
        data_sha256="",
        class_names=class_names,
        image_size=image_size,
    )
    try:
        check_network(task)
    except UserError as e:
        raise UserError(f"arm {arm.name!r}: {e}") from None


def scaled(recipe: Recipe, setting: str, factor: float) -> Recipe:
    """`recipe` with one setting multiplied."""
    return recipe.with_settings({setting: recipe.settings()[setting] * factor})


def _trials(tuning: Tuning | None) -> str:
    if tuning is None:
        return "none"
    return f"{tuning.setting}={','.join(f'{f:g}' for f in tuning.factors)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
