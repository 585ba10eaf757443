"""Pictures that are blank, tiny, of an odd shape or unlike all others; classes of few pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normlab.core.streams import stream
from normlab.curation.pictures import Pictures

BLANK = 4.0  # standard deviation of the values 0 to 255 below which a picture shows nothing
LONG = 3.0  # times as long as wide: the square that is cut out has a third of it
FEW = 20  # training pictures of a class
FEW_TESTS = 5  # test pictures: one is 20 points
UNEQUAL = 3.0  # the largest class over the smallest, where training weighs classes
LONELY = 5.0  # spreads above the median distance to the nearest others
_REFERENCE = 5_000
_NEAREST = 3


@dataclass(frozen=True)
class Oddity:
    """A picture that is odd: its index, the kind and a sentence with figures."""

    index: int
    kind: str
    why: str


def find_oddities(
    pictures: Pictures, features: NDArray[np.float32], sizes: NDArray[np.int64] | None
) -> list[Oddity]:
    """The odd pictures, kind by kind, the oddest first.

    features: (N, D) descriptions; sizes: (N, 2) width and height of the files, 0 where unknown.
    """
    found = _blank(pictures)
    if sizes is not None:
        found += _by_size(sizes, pictures.pixels.shape[1])
    blank = {oddity.index for oddity in found}
    return found + [o for o in _lonely(features) if o.index not in blank]


def _blank(pictures: Pictures) -> list[Oddity]:
    spread = np.array([picture.std((0, 1)).max() for picture in pictures.pixels])
    return [
        Oddity(int(i), "blank", f"its values differ by {spread[i]:.1f} of 255 (standard deviation)")
        for i in np.argsort(spread, kind="stable")
        if spread[i] < BLANK
    ]


def _by_size(sizes: NDArray[np.int64], side: int) -> list[Oddity]:
    width, height = sizes.T
    shorter, longer = sizes.min(1), sizes.max(1)
    ratio = longer / np.maximum(shorter, 1)
    tiny = [
        Oddity(int(i), "tiny", f"{width[i]} × {height[i]} pixels, enlarged to {side} × {side}")
        for i in np.argsort(shorter, kind="stable")
        if 0 < 2 * shorter[i] <= side
    ]
    usual = float(np.median(ratio[shorter > 0])) if (shorter > 0).any() else 1.0
    long = [
        Oddity(
            int(i),
            "odd shape",
            f"{width[i]} × {height[i]} pixels: the square cut out is {100 / ratio[i]:.0f} % of it",
        )
        for i in np.argsort(-ratio, kind="stable")
        if shorter[i] > 0 and ratio[i] > max(LONG, 1.5 * usual)
    ]
    return tiny + long


def _lonely(features: NDArray[np.float32]) -> list[Oddity]:
    """Pictures far from their nearest others, by distances whose logarithms are far out."""
    n = len(features)
    if n < 50:
        return []
    z = (features - features.mean(0)) / (features.std(0) + 1e-4)
    reference = stream(0, "check", "reference").permutation(n)[:_REFERENCE]
    squares = (z**2).sum(1)
    near = np.empty(n)
    for a in range(0, n, 1_000):
        rows = slice(a, min(a + 1_000, n))
        distance = squares[rows, None] + squares[reference] - 2 * z[rows] @ z[reference].T
        # The nearest of all is the picture itself, where it is in the reference.
        distance[np.arange(a, rows.stop)[:, None] == reference] = np.inf
        near[rows] = np.partition(distance, _NEAREST - 1, 1)[:, _NEAREST - 1]
    distance = np.log(np.maximum(near, 1e-9))
    middle = np.median(distance)
    spread = 1.4826 * np.median(np.abs(distance - middle)) + 1e-9
    return [
        Oddity(
            int(i),
            "unlike all others",
            f"{np.exp((distance[i] - middle) / 2):.1f} times as far from its nearest as most are",
        )
        for i in np.argsort(-distance, kind="stable")
        if distance[i] > middle + LONELY * spread
    ]


def class_notes(pictures: Pictures) -> list[str]:
    """A sentence for each class of few pictures, and one where classes are unequal."""
    k, notes = len(pictures.class_names), []
    parts = np.array(pictures.parts)
    counts = {
        part: np.bincount(pictures.labels[parts == part], minlength=k) for part in ("train", "test")
    }
    for index, name in enumerate(pictures.class_names):
        train, test = int(counts["train"][index]), int(counts["test"][index])
        if train < FEW:
            notes.append(f"{name}: {train} to train on; give at least {FEW}")
        if test < FEW_TESTS:
            notes.append(f"{name}: {test} to test on, where one is {_points(test)}")
    there = counts["train"][counts["train"] > 0]
    if len(there) and there.max() > UNEQUAL * there.min():
        large = pictures.class_names[int(counts["train"].argmax())]
        small = pictures.class_names[
            int(np.where(counts["train"] > 0, counts["train"], 1 << 60).argmin())
        ]
        notes.append(
            f"{large} has {there.max():,} to train on and {small} {there.min():,}: training counts "
            "rare classes more, and the balanced accuracy is the one to look at"
        )
    return notes


def _points(count: int) -> str:
    return "no score" if not count else f"{100 / count:.0f} points"


def file_sizes(files: Sequence[Path | None]) -> NDArray[np.int64] | None:
    """(N, 2) width and height by the files' headers; None if there are no files."""
    from normlab.data.pictures.decoding import Readers

    present = [i for i, file in enumerate(files) if file is not None]
    if not present:
        return None
    sizes = np.zeros((len(files), 2), np.int64)
    with Readers() as readers:
        sizes[present] = list(readers.dimensions(files[i] for i in present))  # type: ignore[misc]
    return sizes
