"""A data set in memory: pixels, labels and the names of the classes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from normlab.errors import DataError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# A table of labels by answers then takes 800 MB.
MOST_CLASSES = 10_000

Pixels = NDArray[np.uint8]
Labels = NDArray[np.uint8] | NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """Training and test images with labels 0..K-1. The arrays may be memory-mapped: never write.

    x_train, x_test: (N, H, W, 3) uint8; y_train, y_test: (N,) uint8 or int64.
    """

    name: str
    x_train: Pixels
    y_train: Labels
    x_test: Pixels
    y_test: Labels
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.num_classes > MOST_CLASSES:
            raise DataError(
                f"{self.name} has {self.num_classes:,} classes; give at most {MOST_CLASSES:,}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        height, width, channels = self.x_train.shape[1:]
        return height, width, channels

    @cached_property
    def sha256(self) -> str:
        """One fingerprint of all pixels, labels and class names, whatever the labels' dtype.

        A run resumes only under the data it was started with. Equal data from an archive, a cache
        or an `.npz` have equal fingerprints; the name does not count.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for pixels, labels in ((self.x_train, self.y_train), (self.x_test, self.y_test)):
            digest.update(json.dumps(pixels.shape).encode())
            digest.update(np.ascontiguousarray(pixels).data)
            digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        height, width, _ = self.image_shape
        return (
            f"ImageData({self.name!r}: {len(self.x_train):,} training and {len(self.x_test):,} "
            f"test images of {height}×{width} pixels, {self.num_classes} classes)"
        )


def from_mapping(arrays: Mapping[str, ArrayLike], *, name: str) -> ImageData:
    """Check arrays from outside and make an `ImageData` of them.

    Labels may be (N,) or, as Keras has them, (N, 1). Without `class_names` every label from 0 to
    the largest must occur, and the classes are called "0".."K-1".

    Raises:
        DataError: an array is missing, or has the wrong dtype, shape, length or values.
    """
    if missing := [key for key in ARRAYS if key not in arrays]:
        raise DataError(f"{name}: {', '.join(missing)} missing; data need {', '.join(ARRAYS)}")
    images: dict[str, Any] = {}
    for part in ("train", "test"):
        images[f"x_{part}"] = _pixels(arrays[f"x_{part}"], f"{name}: x_{part}")
        images[f"y_{part}"] = _labels(arrays[f"y_{part}"], f"{name}: y_{part}")
        count, labelled = len(images[f"x_{part}"]), len(images[f"y_{part}"])
        if count != labelled:
            raise DataError(
                f"{name}: {count} images in x_{part} but {labelled} labels in y_{part}; "
                "give one label an image"
            )
    if images["x_train"].shape[1:] != images["x_test"].shape[1:]:
        raise DataError(
            f"{name}: training images are {images['x_train'].shape[1:]} and test images "
            f"{images['x_test'].shape[1:]}; bring them to one size"
        )
    names = _class_names(arrays.get("class_names"), images, name)
    return ImageData(name=name, class_names=names, **images)


def _pixels(value: ArrayLike, what: str) -> Pixels:
    pixels = _array(value, what)
    if pixels.dtype != np.uint8:
        raise DataError(f"{what} is {pixels.dtype}; give pixels as uint8, 0 to 255")
    if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise DataError(f"{what} has shape {pixels.shape}; give (N, H, W, 3) with N ≥ 1")
    return pixels


def _labels(value: ArrayLike, what: str) -> Labels:
    labels = _array(value, what)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"{what} has shape {labels.shape}; give one label an image, (N,)")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{what} is {labels.dtype}; give labels as whole numbers 0 to K-1")
    if labels.size and (labels.min() < 0 or labels.max() > np.iinfo(np.int32).max):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{what} holds the label {wrong}; give labels 0 to K-1")
    return labels if labels.dtype == np.uint8 else labels.astype(np.int64)


def _array(value: ArrayLike, what: str) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError:  # nested lists of unequal length
        raise DataError(f"{what} is not an array; give NumPy arrays") from None


def _class_names(given: ArrayLike | None, images: Mapping[str, Any], name: str) -> tuple[str, ...]:
    labels = np.union1d(images["y_train"], images["y_test"])
    largest = int(labels[-1])
    if given is None:
        if len(labels) <= largest:
            absent = int(np.flatnonzero(labels != np.arange(len(labels)))[0])
            raise DataError(
                f"{name}: no image has the label {absent}, yet labels go up to {largest}; "
                "number the classes 0 to K-1 or give class_names"
            )
        return tuple(str(label) for label in labels)
    names = _array(given, f"{name}: class_names")
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DataError(f"{name}: class_names is {names.dtype} {names.shape}; give K strings")
    if len(names) > MOST_CLASSES:
        raise DataError(f"{name}: {len(names):,} class_names; give at most {MOST_CLASSES:,}")
    if len(set(names.tolist())) != len(names):
        raise DataError(f"{name}: class_names has a name twice; give every class its own")
    if largest >= len(names):
        raise DataError(
            f"{name}: the label {largest} has no name; give class_names for 0 to {largest}"
        )
    return tuple(_text(text) for text in names.tolist())


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
