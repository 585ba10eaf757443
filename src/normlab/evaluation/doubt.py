"""What held-out pictures teach about when a network's answers can be trusted, and when not.

The network never saw them, so what it says of them is like what it will say of new pictures of the
same kind. From them come the temperature of its probabilities, the rule by which it says that it
is not sure, and the sets of classes that hold the true one at a rate. Nothing comes from test
pictures.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from normlab.core.records import typed
from normlab.errors import DataError, UserError
from normlab.evaluation import conformal
from normlab.evaluation.abstention import (
    RiskCoverage,
    Threshold,
    choose_threshold,
    needed,
    risk_coverage,
)
from normlab.text import counted

UNLIKE_SHARE = 0.05  # of pictures like the held-out ones, those that are taken for unlike them
MORE_LIKELY = 0.5  # as probable as this, an answer is right more often than not

Share = Annotated[float, Meta(ge=0, le=1)]
Cosine = Annotated[float, Meta(ge=-1.001, le=1.001)]
Shares = Annotated[tuple[Share, ...], Meta(min_length=1, max_length=100_000)]
Numbers = Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=100_000)]
Temperature = Annotated[float, Meta(ge=0.01, le=100)]

Reason = Literal["unlike", "undecided"]
UNLIKE: Reason = "unlike"
UNDECIDED: Reason = "undecided"
NOTHING_HELD_OUT = (
    "it held out no pictures to learn from when it is not sure: train with --validation 0.1, which "
    "holds out a tenth of the training pictures"
)
WORDS: dict[Reason, str] = {
    UNLIKE: "unlike the pictures it was trained on",
    UNDECIDED: "no class stands out",
}


@dataclass(frozen=True)
class Rule:
    """Which answers are given; the others are "not sure".

    Attributes:
        least_probability: of the answer; below it the picture is `undecided`.
        least_familiarity: of the picture; below it it is `unlike` those of the training.
        threshold: what `least_probability` was chosen by, if a rate was asked for.
    """

    least_probability: float
    least_familiarity: float
    threshold: Threshold | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Both limits as JSON, for other programs."""
        near = self.least_familiarity
        return {
            "least_probability": self.least_probability,
            "least_familiarity": near if near > -np.inf else None,
        }

    def told(self) -> str:
        """The rule in words, and what the held-out pictures showed of it."""
        if self.threshold is None:
            told = f"if a class has a probability of {self.least_probability:.0%} or more"
        else:
            t = self.threshold
            told = (
                f"if a class has a probability of {t.least:.1%} or more; so answered are "
                f"{t.answered:,} of {t.total:,} held-out pictures, {t.right:,} rightly, which "
                f"shows that {t.shown} or more are right, with 95 % confidence"
            )
        if self.least_familiarity > -np.inf:
            told += f"; not sure of the {UNLIKE_SHARE:.0%} least familiar and of what is stranger"
        return told

    def doubts(
        self,
        probabilities: NDArray[np.floating],
        familiarity: NDArray[np.floating] | None = None,
    ) -> list[Reason | None]:
        """Why each of N pictures has no sure answer: `unlike`, `undecided`; None where it has one.

        Args:
            probabilities: (N, K).
            familiarity: (N,); None where nothing can tell.
        """
        near = [None] * len(probabilities) if familiarity is None else familiarity.tolist()
        return [self.doubt(p, f) for p, f in zip(probabilities, near, strict=True)]

    def doubt(
        self, probabilities: NDArray[np.floating], familiarity: float | None
    ) -> Reason | None:
        """The same for one picture with probabilities (K,)."""
        if familiarity is not None and familiarity < self.least_familiarity:
            return UNLIKE
        return UNDECIDED if probabilities.max() < self.least_probability else None


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """What N held-out pictures taught; all that is asked of it later is computed from these.

    Attributes:
        weights: those of the run that it is about.
        temperature: logits are divided by it.
        label: (N,) numbers of the true classes.
        probability: (N,) of the answers, after the temperature.
        right: (N,) whether the answers are.
        of_label: (N,) probabilities of the true classes.
        familiarity: (N,), see `normlab.evaluation.familiarity`; empty if it is not known.
        before, after: calibration on the held-out pictures without and with the temperature, which
            was fitted on them. What it is on others, an evaluation says.
    """

    weights: str
    temperature: Temperature
    label: Numbers
    probability: Shares
    right: tuple[bool, ...]
    of_label: Shares
    familiarity: tuple[Cosine, ...] = ()
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None

    @property
    def total(self) -> int:
        """N, the held-out pictures."""
        return len(self.label)

    @property
    def tells_unlike(self) -> bool:
        """Whether there are enough held-out pictures to say what is unlike them: 19."""
        return (len(self.familiarity) + 1) * UNLIKE_SHARE >= 1

    @cached_property
    def least_familiarity(self) -> float:
        """What all but `UNLIKE_SHARE` of pictures like the held-out ones reach; −∞ if unknown."""
        return conformal.lowest(np.array(self.familiarity), 1 - UNLIKE_SHARE)

    @cached_property
    def curve(self) -> RiskCoverage:
        """Risk and coverage on the held-out pictures; those unlike the others are not answered."""
        known = np.ones(self.total, bool)
        if self.familiarity:
            known = np.array(self.familiarity) >= self.least_familiarity
        return risk_coverage(
            np.array(self.probability)[known], np.array(self.right)[known], self.total
        )

    def rule(self, rate: float | None = None) -> Rule:
        """When to answer.

        Args:
            rate: the share of answers that shall be right; None to answer whatever is familiar and
                more likely right than wrong.

        Raises:
            UserError: so high a rate cannot be shown on the held-out pictures.
        """
        if rate is None:
            return Rule(MORE_LIKELY, self.least_familiarity)
        found = choose_threshold(self.curve, rate)
        if found is None:
            raise UserError(
                f"a rate of {100 * rate:g} % cannot be shown on {counted(self.total, 'picture')} "
                f"held out: it takes {needed(rate)} or more, all answered rightly, and allowance "
                f"for mistakes; hold out more (--validation 0.3) or ask for less{self._less(rate)}"
            )
        return Rule(found.least, self.least_familiarity, found)

    def _less(self, rate: float) -> str:
        """The highest whole percentage below `rate` that can be shown."""
        for percent in range(int(np.ceil(100 * rate)) - 1, 49, -1):
            if choose_threshold(self.curve, percent / 100) is not None:
                return f", up to {percent}"
        return ""

    def set_limits(
        self, rate: float, num_classes: int, *, by_class: bool = False
    ) -> NDArray[np.float64]:
        """How probable each class must be (K,) to be in a picture's set; see `conformal.sets_of`.

        Args:
            rate: of sets that hold the true class, in (0, 1).
            by_class: keep the promise for each class, not only over all of them.
        """
        of_label = np.array(self.of_label)
        if by_class:
            return conformal.lowest_by_class(of_label, np.array(self.label), rate, num_classes)
        return np.full(num_classes, conformal.lowest(of_label, rate))

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON, numbers to six digits."""
        values = asdict(self)
        for key in ("probability", "of_label", "familiarity"):
            values[key] = [round(float(v), 6) for v in values[key]]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Any, where: object) -> "Doubt":
        """Read what `as_dict` writes.

        Raises:
            DataError: something is missing, of another kind or out of its range.
        """
        found = typed(values, cls, where)
        lengths = {len(found.label), len(found.probability), len(found.right), len(found.of_label)}
        if found.familiarity:
            lengths.add(len(found.familiarity))
        if len(lengths) != 1:
            raise DataError(f"{where} is not as normlab wrote it (lists of different lengths)")
        return found
