"""What a run's doubt gives on its test images: chosen on held-out pictures, counted here."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from normlab.errors import UserError
from normlab.evaluation.abstention import Threshold
from normlab.evaluation.conformal import sets_of
from normlab.evaluation.doubt import NOTHING_HELD_OUT
from normlab.evaluation.evaluation import Evaluation
from normlab.statistics import accuracy_interval


@dataclass(frozen=True)
class Answered:
    """How many of `total` test images are answered, and how many of them rightly.

    Attributes:
        threshold: what was chosen on the held-out pictures, if a rate was asked for.
    """

    answered: int
    right: int
    total: int
    threshold: Threshold | None

    def __str__(self) -> str:
        told = (
            f"{self.answered:,} of {self.total:,} test pictures ({self.answered / self.total:.1%})"
        )
        if not self.answered:
            return f"Sure of {told}"
        low, high = accuracy_interval(self.right, self.answered)
        told += f", {self.right / self.answered:.1%} of them rightly ({low:.1%} to {high:.1%})"
        if self.threshold is None:
            return f"Sure of {told}"
        t = self.threshold
        return (
            f"To be right at {t.rate:.1%} it answers {told}; the held-out pictures showed "
            f"{t.shown} or more, {t.right:,} of {t.answered:,} answered"
        )


@dataclass(frozen=True)
class Sets:
    """Sets of classes on the test images.

    Attributes:
        rate: that was promised.
        by_class: whether for each class.
        covered: share of sets with the true class.
        size: classes in a set, the mean.
        single: share of sets of one class.
        worst: the class that is covered least, and its share.
    """

    rate: float
    by_class: bool
    covered: float
    size: float
    single: float
    worst: tuple[str, float]

    def __str__(self) -> str:
        name, share = self.worst
        return (
            f"Sets at {self.rate:.1%}{' for each class' if self.by_class else ''}: "
            f"{self.covered:.1%} hold the true class ({share:.1%} of {name}, the least), "
            f"{self.size:.2f} classes a set, {self.single:.1%} with one"
        )


@dataclass(frozen=True)
class Sureness:
    """What was asked for of it; `note` says what is not possible."""

    answered: Answered | None
    sets: Sets | None
    note: str | None

    def lines(self) -> list[str]:
        """For the terminal."""
        return [str(what) for what in (self.answered, self.sets, self.note) if what is not None]

    def as_dict(self) -> dict[str, Any]:
        """As JSON; empty if nothing is known."""
        found: dict[str, Any] = {}
        if self.answered is not None:
            found["answered"] = asdict(self.answered)
        if self.sets is not None:
            found["sets"] = asdict(self.sets)
        return found


def sureness(
    evaluation: Evaluation,
    abstain_at: float | None = None,
    sets: float | None = None,
    *,
    per_class: bool = False,
) -> Sureness:
    """Count what would be answered, at rates in per cent.

    Raises:
        UserError: a rate was asked for that the run cannot show, or of a run that learnt no doubt.
    """
    doubt = evaluation.doubt
    if doubt is None:
        if evaluation.views != "single":
            note = "Calibration and doubt are of a single view"
        else:
            note = f"Calibration: {NOTHING_HELD_OUT}"
        if abstain_at is not None or sets is not None:
            raise UserError(f"run {evaluation.run} knows no doubt: {note[0].lower()}{note[1:]}")
        return Sureness(None, None, note)
    rate = None if abstain_at is None else abstain_at / 100
    rule, chosen = doubt.rule(rate), evaluation.answered(rate)
    answered = Answered(
        int(chosen.sum()), int(evaluation.right[chosen].sum()), len(chosen), rule.threshold
    )
    return Sureness(
        answered, None if sets is None else _sets(evaluation, sets / 100, per_class), None
    )


def _sets(evaluation: Evaluation, rate: float, by_class: bool) -> Sets:
    assert evaluation.doubt is not None
    names, labels = evaluation.class_names, evaluation.labels
    least = evaluation.doubt.set_limits(rate, len(names), by_class=by_class)
    inside = sets_of(evaluation.probabilities, least)
    held = inside[np.arange(len(labels)), labels]
    shares = {
        name: float(held[labels == k].mean()) for k, name in enumerate(names) if (labels == k).any()
    }
    size = inside.sum(1)
    return Sets(
        rate=rate,
        by_class=by_class,
        covered=float(held.mean()),
        size=float(size.mean()),
        single=float((size == 1).mean()),
        worst=min(shares.items(), key=lambda row: row[1]),
    )
