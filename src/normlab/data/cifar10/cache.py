"""The one copy of decoded CIFAR-10 on this machine: four `.npy` files.

Nothing that is stored says what the arrays must be: every load hashes them (0.1 s for 184 MB) and
compares with the constants in `layouts.py`, so a file that changed on disk is always noticed.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normlab.data.cache import Report, cache_folder
from normlab.data.cifar10 import layouts as cifar10
from normlab.data.cifar10.layouts import CIFAR10, CLASS_NAMES, Reference
from normlab.data.images import ARRAYS, ImageData
from normlab.errors import DataError

FOLDER = "cifar10"


@dataclass(frozen=True, kw_only=True)
class Info:
    """What is in the cache, by the look of it; `verify` reads every byte."""

    folder: Path
    present: bool
    bytes: int
    arrays: dict[str, tuple[int, ...]]
    class_names: tuple[str, ...]

    def __str__(self) -> str:
        if not self.present:
            return f"CIFAR-10 is not in {self.folder}; `normlab data fetch` gets it"
        shapes = (f"  {name:8} uint8 {shape}" for name, shape in self.arrays.items())
        return "\n".join(
            [
                f"CIFAR-10 in {self.folder}, {self.bytes / 1e6:.0f} MB",
                *shapes,
                f"  classes  {', '.join(self.class_names)}",
            ]
        )


@dataclass(frozen=True, kw_only=True)
class Verified:
    """SHA-256 of each cached array, None where it cannot be read, beside what it must be."""

    folder: Path
    found: dict[str, str | None]
    expected: dict[str, str]

    @property
    def wrong(self) -> tuple[str, ...]:
        return tuple(name for name in self.expected if self.found[name] != self.expected[name])

    @property
    def ok(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        lines = [
            f"  {name:8} {self.found[name] or 'cannot be read'}"
            f"{f' should be {self.expected[name]}' if name in self.wrong else ' as it should be'}"
            for name in self.expected
        ]
        end = "`normlab data fetch` replaces it" if self.wrong else "nothing has changed"
        return "\n".join([f"CIFAR-10 in {self.folder}", *lines, end])


def location() -> Path:
    """The folder that holds CIFAR-10, or would."""
    return cache_folder() / FOLDER


def read_cache(reference: Reference = CIFAR10) -> ImageData | None:
    """CIFAR-10, memory-mapped, after a check of every byte; None if it was never fetched.

    Raises:
        DataError: a cached file cannot be read or has changed.
    """
    folder = location()
    if not folder.exists():
        return None
    arrays = {name: _map(folder / f"{name}.npy") for name in ARRAYS}
    if wrong := reference.mismatches(arrays):
        raise DataError(
            f"{folder / wrong[0]}.npy has changed since it was written; "
            "`normlab data fetch` replaces it"
        )
    return cifar10.image_data(arrays)


def _map(path: Path) -> NDArray[np.uint8]:
    try:
        array: NDArray[np.uint8] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged"
        raise DataError(f"{path}: {reason}; `normlab data fetch` replaces it") from error
    return array


def info(reference: Reference = CIFAR10) -> Info:
    """What is in the cache, without reading all of it."""
    folder = location()
    files = [folder / f"{name}.npy" for name in ARRAYS]
    present = all(file.is_file() for file in files)
    return Info(
        folder=folder,
        present=present,
        bytes=sum(file.stat().st_size for file in files) if present else 0,
        arrays={name: reference.shape(name) for name in ARRAYS} if present else {},
        class_names=CLASS_NAMES,
    )


def verify(reference: Reference = CIFAR10) -> Verified:
    """Hash every cached array.

    Raises:
        DataError: nothing is in the cache.
    """
    folder = location()
    if not folder.exists():
        raise DataError(f"nothing to verify: {folder} does not exist; run `normlab data fetch`")
    found: dict[str, str | None] = {}
    for name in ARRAYS:
        try:
            found[name] = cifar10.sha256(_map(folder / f"{name}.npy"))
        except DataError:
            found[name] = None
    return Verified(folder=folder, found=found, expected=dict(reference.sha256))


def is_good(reference: Reference, report: Report | None = None) -> bool:
    """Whether CIFAR-10 is there, bit for bit; what is wrong with it is reported."""
    try:
        return read_cache(reference) is not None
    except DataError as error:
        if report:
            report(str(error))
        return False
