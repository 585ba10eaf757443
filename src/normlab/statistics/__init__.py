"""How sure are we? Paired comparisons of accuracies, on NumPy and SciPy alone.

One test decides (`sign_flip`), one rule turns it into a verdict (`verdict`); everything in
`descriptive` stands beside the verdict and decides nothing. Accuracies and their differences are
fractions in [0, 1] and [-1, 1]; only sentences speak of points (hundredths).
"""

from normlab.statistics.descriptive import (
    Description,
    McNemar,
    accuracy_interval,
    describe,
    mcnemar,
)
from normlab.statistics.measure import ACCURACY, Measure
from normlab.statistics.sign_flip import SignFlips, sign_flips, smallest_p
from normlab.statistics.verdict import (
    Comparison,
    Contrast,
    Verdict,
    holm,
    judge,
    level_of_look,
)

__all__ = [
    "ACCURACY",
    "Comparison",
    "Contrast",
    "Description",
    "McNemar",
    "Measure",
    "SignFlips",
    "Verdict",
    "accuracy_interval",
    "describe",
    "holm",
    "judge",
    "level_of_look",
    "mcnemar",
    "sign_flips",
    "smallest_p",
]
