"""What a study compares: the name of a number, and how its values and differences are told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A number that every run gives.

    Attributes:
        name: as in "points of test accuracy".
        lower_is_better: as of a loss; then `better` means a smaller value.
        fraction: values lie in [0, 1] and are told in percent, differences in points.
        diverged_as: how a run without a value of its own is counted: "at chance", "as 0.1".
        scope: what a verdict holds for, beside the seeds.
    """

    name: str
    lower_is_better: bool = False
    fraction: bool = False
    diverged_as: str = "at chance"
    scope: str = "this training set and this test set"

    def limits(self, lower: float, upper: float) -> tuple[float, float]:
        """An interval of differences, no wider than differences can be."""
        return (max(lower, -1.0), min(upper, 1.0)) if self.fraction else (lower, upper)

    def value(self, x: float | None) -> str:
        """
        >>> ACCURACY.value(0.7896), Measure("loss").value(1.23456)
        ('78.96 %', '1.235')
        """
        if x is None:
            return "–"
        return f"{100 * x:.2f} %" if self.fraction else f"{x:.4g}"

    def difference(self, x: float | None) -> str:
        """A signed difference without its unit."""
        if x is None:
            return "–"
        return f"{100 * x:+.2f}" if self.fraction else f"{x:+.4g}"

    def spread(self, x: float | None) -> str:
        """A standard deviation, or a difference without its sign."""
        if x is None:
            return "–"
        return f"{100 * x:.2f}" if self.fraction else f"{x:.3g}"

    @property
    def unit(self) -> str:
        """
        >>> ACCURACY.unit, Measure("val_loss", lower_is_better=True).unit
        ('points of test accuracy', 'in val_loss (lower is better)')
        """
        if self.fraction:
            return f"points of {self.name}"
        return f"in {self.name}{' (lower is better)' if self.lower_is_better else ''}"


ACCURACY = Measure("test accuracy", fraction=True)
