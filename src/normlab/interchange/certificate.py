"""Does an exported model agree with the run it came from? Measured on every test image."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from normlab.errors import NormlabError

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

    @property
    def passed(self) -> bool:
        within = self.largest_difference is not None and self.largest_difference <= self.tolerance
        read = self.reading is None or self.reading.passed
        near = self.familiarity_difference
        known = near is None or near <= self.tolerance
        return within and self.other_answers == 0 and read and known

    def require(self) -> None:
        """Raise `CertificateError` with the figures unless the model agrees."""
        if not self.passed:
            raise CertificateError(f"the exported model disagrees, nothing was written: {self}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), allow_nan=False)

    def __str__(self) -> str:
        largest = self.largest_difference
        difference = "not finite" if largest is None else f"{largest:.1e}"
        near = self.familiarity_difference
        familiar = "" if near is None else f", in familiarity {near:.1e}"
        return (
            f"largest difference in probability {difference}{familiar} "
            f"(at most {self.tolerance:g}), "
            f"another answer on {self.other_answers:,} of {self.test_images:,} test images, "
            f"{self.ties:,} ties; accuracy {self.run_accuracy:.4f} in the run, "
            f"{self.exported_accuracy:.4f} exported" + (f"; {self.reading}" if self.reading else "")
        )


class Check(Protocol):
    """Compares an exported model's answers with its run's."""

    def __call__(
        self,
        exported: NDArray[np.floating],
        checked_with: str,
        chosen: NDArray[np.integer] | None = None,
        familiarity: NDArray[np.floating] | None = None,
    ) -> Certificate:
        """The certificate.

        Args:
            exported: (N, K), computed by `checked_with`.
            chosen: which test images they are of; by default all.
            familiarity: (N,), if the model tells it.

        Raises:
            CertificateError: they disagree.
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
