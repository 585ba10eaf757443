"""A data set in memory: pixels, labels and the names of the classes."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
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
    x_val, y_val: a validation part of its own, if the data have one; else it is drawn from the
        training images.
    natural_size: the largest size to which at least half of the pictures need not be enlarged, of
        `normlab.data.pictures.sizes.SIZES`, where they were resized to a size that nobody chose.
    files_train, files_test, files_val: N names of the files that the images were read from.
    groups_train: (N,) numbers of groups that no split may part, each group in one piece; or None.
    """

    name: str
    x_train: Pixels
    y_train: Labels
    x_test: Pixels
    y_test: Labels
    class_names: tuple[str, ...]
    x_val: Pixels | None = None
    y_val: Labels | None = None
    natural_size: int | None = None
    files_train: tuple[str, ...] | None = None
    files_test: tuple[str, ...] | None = None
    files_val: tuple[str, ...] | None = None
    groups_train: NDArray[np.int64] | None = None

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
        or an `.npz` have equal fingerprints; the name and those of files do not count.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for pixels, labels in self._parts().values():
            digest.update(json.dumps(pixels.shape).encode())
            digest.update(np.ascontiguousarray(pixels).data)
            digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
        return digest.hexdigest()

    def _parts(self) -> dict[str, tuple[Pixels, Labels]]:
        parts = {"training": (self.x_train, self.y_train), "test": (self.x_test, self.y_test)}
        if self.x_val is not None and self.y_val is not None:
            parts["validation"] = (self.x_val, self.y_val)
        return parts

    def summary(self, most: int = 10) -> str:
        """Classes and counts in one line: `cat 90 + 20, dog 80 + 20 (training + test)`.

        most: classes that are listed; of the others, their number.
        """
        parts = self._parts()
        counts = [np.bincount(y, minlength=self.num_classes) for _, y in parts.values()]
        listed = [
            f"{name} {' + '.join(f'{count[k]:,}' for count in counts)}"
            for k, name in enumerate(self.class_names[:most])
        ]
        more = f" and {self.num_classes - most} more" if self.num_classes > most else ""
        return f"{self.num_classes} classes: {', '.join(listed)}{more} ({' + '.join(parts)})"

    def __repr__(self) -> str:
        height, width, _ = self.image_shape
        return (
            f"ImageData({self.name!r}: {len(self.x_train):,} training and {len(self.x_test):,} "
            f"test images of {height}×{width} pixels, {self.num_classes} classes)"
        )


def from_mapping(arrays: Mapping[str, ArrayLike], *, name: str) -> ImageData:
    """Check arrays from outside and make an `ImageData` of them.

    Labels may be (N,) or, as Keras has them, (N, 1); whole numbers, or floats that are whole.
    `x_val` and `y_val` are optional. Without `class_names` every label from 0 to the largest must
    occur, and the classes are called "0".."K-1".

    Raises:
        DataError: an array is missing, or has the wrong dtype, shape, length or values.
    """
    if missing := [key for key in ARRAYS if key not in arrays]:
        raise DataError(f"{name}: {', '.join(missing)} missing; data need {', '.join(ARRAYS)}")
    if ("x_val" in arrays) != ("y_val" in arrays):
        raise DataError(f"{name}: one of x_val and y_val is missing; give both or none")
    images: dict[str, Any] = {}
    parts = ("train", "test", "val") if "x_val" in arrays else ("train", "test")
    for part in parts:
        images[f"x_{part}"] = _pixels(arrays[f"x_{part}"], f"{name}: x_{part}")
        images[f"y_{part}"] = _labels(arrays[f"y_{part}"], f"{name}: y_{part}")
        count, labelled = len(images[f"x_{part}"]), len(images[f"y_{part}"])
        if count != labelled:
            raise DataError(
                f"{name}: {count} images in x_{part} but {labelled} labels in y_{part}; "
                "give one label an image"
            )
    for part, word in (("test", "test"), ("val", "validation")):
        if part in parts and images[f"x_{part}"].shape[1:] != images["x_train"].shape[1:]:
            raise DataError(
                f"{name}: training images are {images['x_train'].shape[1:]} and {word} images "
                f"{images[f'x_{part}'].shape[1:]}; bring them to one size"
            )
    names = _class_names(arrays.get("class_names"), images, name)
    return ImageData(name=name, class_names=names, **images)


def from_pairs(pairs: Sequence[Sequence[ArrayLike]], *, name: str) -> ImageData:
    """`((x_train, y_train), (x_test, y_test))`, as Keras' `load_data()` returns it.

    Raises:
        DataError: it is not of that form, or `from_mapping` refuses the arrays.
    """
    if len(pairs) != 2 or any(
        not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs
    ):
        raise DataError(
            f"{name} is a {type(pairs).__name__} of {len(pairs)}; "
            "give ((x_train, y_train), (x_test, y_test)) or a mapping of arrays"
        )
    return from_mapping(dict(zip(ARRAYS, (*pairs[0], *pairs[1]), strict=True)), name=name)


def _pixels(value: ArrayLike, what: str) -> Pixels:
    pixels = _array(value, what)
    x = what.split(": ")[-1]
    if pixels.dtype != np.uint8:
        raise DataError(f"{what} is {pixels.dtype}; {_to_uint8(pixels, x)}")
    if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise DataError(f"{what} has shape {pixels.shape}; {_to_rgb(pixels.shape, x)}")
    return pixels


def _to_uint8(pixels: NDArray[Any], x: str) -> str:
    """How these values become what is wanted."""
    wanted = "give pixels as uint8, 0 to 255"
    if pixels.dtype.kind not in "iufb" or not pixels.size:
        return wanted
    low, high = pixels.min(), pixels.max()
    if not np.isfinite([float(low), float(high)]).all():
        return f"{wanted}; there are NaN or infinite values among them"
    if pixels.dtype.kind == "f" and high <= 1:
        if low >= 0:
            return f"{wanted}: ({x} * 255).round().astype('uint8')"
        return f"{wanted}: these go from {low:.3g} to {high:.3g}, so undo what scaled them"
    if low < 0:
        return f"{wanted}: these go from {low:.6g} to {high:.6g}"
    if high <= 255:
        if pixels.dtype.kind == "b":
            return f"{wanted}: {x}.astype('uint8') * 255"
        whole = "" if pixels.dtype.kind in "iu" else ".round()"
        return f"{wanted}: {x}{whole}.astype('uint8')"
    bits = next((b for b in (10, 12, 14, 16) if high < 2**b), None)
    if bits is None:
        return f"{wanted}: these go up to {high:.6g}"
    return f"{wanted}: ({x} / {2**bits - 1} * 255).round().astype('uint8') if they hold {bits} bits"


def _to_rgb(shape: tuple[int, ...], x: str) -> str:
    """How an array of this shape becomes what is wanted."""
    wanted = "give (N, H, W, 3) with N ≥ 1"
    if 0 in shape or not shape:
        return wanted
    if len(shape) == 4 and shape[1] == 3:
        return f"{wanted}: {x}.transpose(0, 2, 3, 1)"
    if len(shape) == 4 and shape[3] == 1:
        return f"{wanted}: {x}.repeat(3, axis=3)"
    if len(shape) == 4 and shape[1] == 1:
        return f"{wanted}: {x}.transpose(0, 2, 3, 1).repeat(3, axis=3)"
    if len(shape) == 4 and shape[3] == 4:
        return f"{wanted}: {x}[..., :3] leaves the alpha channel out"
    if len(shape) == 3 and shape[2] == 3:
        return f"{wanted}: {x}[None] if it is one image"
    if len(shape) == 3:
        return f"{wanted}: {x}[..., None].repeat(3, axis=3) if the images are grey"
    side = math.isqrt(shape[-1] // 3)
    if len(shape) == 2 and side > 1 and side * side * 3 == shape[1]:
        return f"{wanted}: {x}.reshape(-1, {side}, {side}, 3), if colours come last"
    return wanted


def _labels(value: ArrayLike, what: str) -> Labels:
    labels = _array(value, what)
    y = what.split(": ")[-1]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.dtype.kind in "iufb" and _is_one_hot(labels):
        raise DataError(
            f"{what} has shape {labels.shape}, one-hot; give one label an image: {y}.argmax(1)"
        )
    if labels.ndim != 1:
        raise DataError(f"{what} has shape {labels.shape}; give one label an image, (N,)")
    if labels.dtype.kind == "f":
        labels = _whole(labels, what)
    if labels.dtype.kind in "USO":
        raise DataError(
            f"{what} is {labels.dtype}; give labels as whole numbers 0 to K-1: of texts "
            f"class_names, {y} = numpy.unique({y}, return_inverse=True) makes them"
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{what} is {labels.dtype}; give labels as whole numbers 0 to K-1")
    if labels.size and (labels.min() < 0 or labels.max() > np.iinfo(np.int32).max):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{what} holds the label {wrong}; give labels 0 to K-1")
    return labels if labels.dtype == np.uint8 else labels.astype(np.int64)


def _is_one_hot(labels: NDArray[Any]) -> bool:
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all())


def _whole(labels: NDArray[Any], what: str) -> NDArray[Any]:
    """Floats that are whole numbers, as a column with gaps has them, as integers."""
    if gaps := int(np.isnan(labels).sum()):
        raise DataError(
            f"{what} has NaN, no label, for {gaps:,} of {len(labels):,} images; leave those out"
        )
    broken = labels[(labels != np.trunc(labels)) | (np.abs(labels) >= 2**53)]
    if broken.size:
        raise DataError(
            f"{what} is {labels.dtype} and holds {broken[0]:g}; give labels as whole numbers "
            "0 to K-1"
        )
    return labels.astype(np.int64)


def _array(value: ArrayLike, what: str) -> NDArray[Any]:
    try:
        array = np.asanyarray(value)
    except ValueError:  # nested lists of unequal length
        raise DataError(f"{what} is not an array; give NumPy arrays") from None
    except (TypeError, RuntimeError) as error:  # a tensor on another device, or one that learns
        reason = str(error).splitlines()[0]
        raise DataError(f"{what} is not an array ({reason}); give NumPy arrays") from None
    if isinstance(array, np.ma.MaskedArray):
        hidden = int(np.count_nonzero(np.ma.getmaskarray(array)))
        if hidden:
            raise DataError(
                f"{what} is a masked array with {hidden:,} values masked; "
                "fill them in with .filled(…), or leave those images out"
            )
        array = array.data
    return array if isinstance(array, np.memmap) else np.asarray(array)


def _class_names(given: ArrayLike | None, images: Mapping[str, Any], name: str) -> tuple[str, ...]:
    labels = np.unique(np.concatenate([y for key, y in images.items() if key[0] == "y"]))
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
