"""Does an exported model agree with the run it came from? Measured on every test image."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from normlab.errors import NormlabError
from normlab.statistics import mcnemar

TOLERANCE = 1e-4  # in probability
TIE = 2 * TOLERANCE  # two probabilities this close may change places


class CertificateError(NormlabError):
    """An exported model does not agree with its run; nothing was written."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How an exported model reads pictures of other sizes than its own, beside how training does.

    Attributes:
        largest_difference: between pixels that the network sees, of 255, over all pictures.
        largest_change: in probability, of that.
        other_answers: pictures with another most probable class for it.
    """

    pictures: int
    largest_difference: float
    largest_change: float
    other_answers: int

    @classmethod
    def of(
        cls,
        pixels: NDArray[np.floating],
        squares: NDArray[np.uint8],
        answers: NDArray[np.floating],
        expected: NDArray[np.floating],
    ) -> "Reading":
        """Compare what the model sees with `squares`, as training reads the pictures.

        Args:
            pixels, squares: (N, S, S, 3), 0 to 255.
            answers, expected: probabilities (N, K) for the pictures and for the squares.
        """
        return cls(
            pictures=len(squares),
            largest_difference=float(np.abs(pixels - squares).max()),
            largest_change=float(np.abs(answers - expected).max()),
            other_answers=int((answers.argmax(1) != expected.argmax(1)).sum()),
        )

    @property
    def passed(self) -> bool:
        return self.largest_difference <= 1

    def __str__(self) -> str:
        return (
            f"{self.pictures:,} pictures of other sizes read within {self.largest_difference:g} of "
            f"255, which changes a probability by {self.largest_change:.1e} at most"
        )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What eight bits cost and give, on all test images; float32 stands first in every pair.

    Attributes:
        accuracy: fractions.
        loss: of accuracy; negative where eight bits are right more often.
        loss_interval: 95 %, paired: (b − c)/N ± 1.96·√(b + c − (b − c)²/N)/N with the b images that
            float32 alone has right and the c that eight bits alone have (Agresti 2013, eq. 11.3).
        p_value: of McNemar's exact test of the same.
        max_loss: above this nothing is written.
        kept_in_float: layers that were not quantised, by measurement.
        calibration_error: expected, as in `Evaluation`.
        changed_answers: share of images with another most probable class.
        milliseconds: for a batch, by its size; one thread on `processor`.
    """

    accuracy: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    p_value: float
    max_loss: float
    kept_in_float: tuple[str, ...]
    calibration_error: tuple[float, float]
    changed_answers: float
    milliseconds: dict[str, tuple[float, float]]
    processor: str
    bytes_of_float: int = 0
    bytes_of_int8: int = 0

    @classmethod
    def of(cls, right: NDArray[np.bool_], right_int8: NDArray[np.bool_], **rest: Any) -> "Cost":
        """The cost by which images (N,) each has right."""
        test, n = mcnemar(right, right_int8), len(right)
        difference = test.only_first - test.only_other
        discordant = test.only_first + test.only_other
        half = 1.96 * np.sqrt(discordant - difference**2 / n) / n
        loss = difference / n
        return cls(
            accuracy=(float(right.mean()), float(right_int8.mean())),
            loss=loss,
            loss_interval=(float(loss - half), float(loss + half)),
            p_value=test.p_value,
            **rest,
        )

    def __str__(self) -> str:
        low, high = (100 * x for x in self.loss_interval)
        times = ", ".join(
            f"{before:.3g} → {after:.3g} ms a batch of {size}"
            for size, (before, after) in self.milliseconds.items()
        )
        kept = ", ".join(self.kept_in_float)
        return (
            f"eight bits lose {100 * self.loss:.2f} points of accuracy (95 % interval {low:.2f} to "
            f"{high:.2f}, McNemar's p = {self.p_value:.2g}; at most {100 * self.max_loss:g}): "
            f"{self.accuracy[0]:.4f} → {self.accuracy[1]:.4f}; "
            f"{self.changed_answers:.2%} of answers changed; expected calibration error "
            f"{self.calibration_error[0]:.4f} → {self.calibration_error[1]:.4f}; "
            f"{self.bytes_of_float / 1000:,.0f} → {self.bytes_of_int8 / 1000:,.0f} kB; {times}, "
            f"one thread of {self.processor}" + (f"; in float32 stay {kept}" if kept else "")
        )


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The comparison of an exported model's answers with its run's, on N test images.

    Attributes:
        checked_with: what computed the exported model's answers.
        largest_difference: in probability, over all images and classes; None if not finite.
        other_answers: images with another most probable class, ties not counted.
        ties: images with another most probable class whose two highest probabilities are within
            `TIE` of each other.
        run_accuracy, exported_accuracy: fractions of the N images.
        reading: of pictures of other sizes; None where the format takes the network's own alone.
        familiarity_difference: the largest, over all images; None if the model does not tell it.
        cost: of eight bits, which are judged by their loss of accuracy; None for float32, which is
            judged by its answers.
    """

    data: str
    data_sha256: str
    weights_sha256: str
    test_images: int
    checked_with: str
    largest_difference: float | None
    tolerance: float = TOLERANCE
    other_answers: int
    ties: int
    tie: float = TIE
    run_accuracy: float
    exported_accuracy: float
    reading: Reading | None = None
    familiarity_difference: float | None = None
    cost: Cost | None = None

    @property
    def passed(self) -> bool:
        if self.cost is not None:
            finite = self.largest_difference is not None
            read = self.reading is None or self.reading.passed
            return finite and read and self.cost.loss <= self.cost.max_loss
        within = self.largest_difference is not None and self.largest_difference <= self.tolerance
        read = self.reading is None or self.reading.passed
        near = self.familiarity_difference
        known = near is None or near <= self.tolerance
        return within and self.other_answers == 0 and read and known

    def require(self) -> None:
        """Raise `CertificateError` with the figures unless the model agrees."""
        if not self.passed:
            what = "disagrees" if self.cost is None else "loses too much"
            raise CertificateError(f"the exported model {what}, nothing was written: {self}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), allow_nan=False)

    def __str__(self) -> str:
        reading = f"; {self.reading}" if self.reading else ""
        if self.cost is not None:
            return f"{self.cost}{reading}"
        largest = self.largest_difference
        difference = "not finite" if largest is None else f"{largest:.1e}"
        near = self.familiarity_difference
        familiar = "" if near is None else f", in familiarity {near:.1e}"
        return (
            f"largest difference in probability {difference}{familiar} "
            f"(at most {self.tolerance:g}), "
            f"another answer on {self.other_answers:,} of {self.test_images:,} test images, "
            f"{self.ties:,} ties; accuracy {self.run_accuracy:.4f} in the run, "
            f"{self.exported_accuracy:.4f} exported{reading}"
        )


class Check(Protocol):
    """Compares an exported model's answers with its run's."""

    def __call__(
        self,
        exported: NDArray[np.floating],
        checked_with: str,
        chosen: NDArray[np.integer] | None = None,
        familiarity: NDArray[np.floating] | None = None,
        *,
        agreeing: bool = True,
    ) -> Certificate:
        """The certificate.

        Args:
            exported: (N, K), computed by `checked_with`.
            chosen: which test images they are of; by default all.
            familiarity: (N,), if the model tells it.
            agreeing: whether they have to agree.

        Raises:
            CertificateError: they have to agree and disagree.
        """


def certify(
    expected: NDArray[np.floating],
    exported: NDArray[np.floating],
    labels: NDArray[np.integer],
    *,
    data: str,
    data_sha256: str,
    weights_sha256: str,
    checked_with: str,
    familiarity: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
) -> Certificate:
    """Compare probabilities (N, K) of the run, `expected`, with those of the exported model.

    Args:
        labels: (N,).
        familiarity: (N,) of the run and of the exported model, if it tells it.

    Raises:
        CertificateError: the shapes differ.
    """
    if expected.shape != exported.shape:
        raise CertificateError(
            f"the exported model disagrees, nothing was written: it answers {exported.shape} "
            f"where the run answers {expected.shape}"
        )
    difference = float(np.abs(expected - exported.astype(np.float64)).max())
    near = None
    if familiarity is not None:  # no number is as far off as can be
        near = float(np.nan_to_num(np.abs(np.subtract(*familiarity)), nan=2.0).max())
    top_two = np.sort(expected, axis=1)[:, -2:]
    tied = top_two[:, 1] - top_two[:, 0] <= TIE
    answers = exported.argmax(1)
    other = answers != expected.argmax(1)
    return Certificate(
        data=data,
        data_sha256=data_sha256,
        weights_sha256=weights_sha256,
        checked_with=checked_with,
        test_images=len(labels),
        largest_difference=difference if np.isfinite(difference) else None,
        other_answers=int((other & ~tied).sum()),
        ties=int((other & tied).sum()),
        run_accuracy=float((expected.argmax(1) == labels).mean()),
        exported_accuracy=float((answers == labels).mean()),
        familiarity_difference=near,
    )
