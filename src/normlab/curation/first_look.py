"""A short look at data before each training: bounded in time, and silent if nothing is found."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normlab.core.streams import stream
from normlab.curation.copies import leaks
from normlab.curation.descriptors import to_side
from normlab.curation.oddities import class_notes
from normlab.curation.pictures import from_images
from normlab.data import ImageData
from normlab.data.changes import picture_names
from normlab.text import have

LEAST = 200  # pictures; fewer are seen at a glance
MOST_TRAIN, MOST_TEST, MOST_PAIRS = 3_000, 500, 1_000
_NOTES = 3


@dataclass(frozen=True)
class FirstLook:
    """What a short look found.

    classes: lines about small and unequal classes.
    leak: a sentence about test pictures that are trained on, changed or not; None if none is seen.
    """

    classes: list[str]
    leak: str | None

    @property
    def lines(self) -> list[str]:
        return [*self.classes, *([self.leak] if self.leak else [])]


def first_look(images: ImageData) -> FirstLook:
    """Look at 500 test and 3,000 training pictures at most, drawn once."""
    if len(images.x_train) + len(images.x_test) < LEAST:
        return FirstLook([], None)
    notes = class_notes(from_images(images))
    classes = notes[:_NOTES]
    if len(notes) > _NOTES:
        classes.append(f"{len(notes) - _NOTES} more classes are small")
    train = _drawn(len(images.x_train), MOST_TRAIN)
    test = _drawn(len(images.x_test), MOST_TEST)
    pairs = leaks(to_side(images.x_train[train]), to_side(images.x_test[test]), most=MOST_PAIRS)
    if not len(pairs):
        return FirstLook(classes, None)
    names = picture_names(images)
    of = f"of {len(test):,} test pictures" + _sampled(len(test), len(images.x_test))
    among = f"{len(train):,} training pictures" + _sampled(len(train), len(images.x_train))
    shown = ", ".join(
        f"{names['test'][test[b]]} is much like {names['train'][train[a]]}" for a, b in pairs[:2]
    )
    copied = len(set(pairs[:, 1].tolist()))
    more = f" and {len(pairs) - 2:,} more" if len(pairs) > 2 else ""
    return FirstLook(
        classes,
        f"{copied:,} {of} {have(copied)} a near copy among {among}, which makes "
        f"the score too good: {shown}{more}; `normlab data check` shows them all",
    )


def _drawn(n: int, most: int) -> NDArray[np.int64]:
    return np.sort(stream(0, "first look").permutation(n)[:most])


def _sampled(count: int, every: int) -> str:
    return f" (drawn from {every:,})" if count < every else ""
