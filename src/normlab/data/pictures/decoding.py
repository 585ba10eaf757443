"""Decode many pictures once, on all cores, and keep the result in the cache.

Pictures are read in child processes with limits of memory and time: a file that crashes its decoder
or floods it is one more unusable picture.

The result for one folder and image size lies in the cache's folder `pictures-…` as `.npy` files.
One SHA-256 over them and over the key (names, sizes and times of all sources) stands beside them;
where it does not fit, because a source or the cache has changed, everything is decoded anew.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import LifoQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from normlab.core.bars import transient_bar
from normlab.core.cores import cores
from normlab.core.sandbox import TAKES, LimitError, Worker
from normlab.data.cache import cache_folder, write_cache, writing
from normlab.data.pictures.reading import dimensions, fingerprint, read_measured, to_square
from normlab.data.pictures.sizes import SIZES
from normlab.errors import DataError
from normlab.text import printable

_VERSION = 4  # raise it when the same file would decode to other pixels
_ARRAYS = ("pixels", "fingerprints", "problems", "peaks")

# For one picture. 200 megapixels of JPEG take less than a quarter of the memory, 48 of PNG, TIFF or
# HEIC less than half, and 48 of WebP nearly all.
MEMORY = 1 << 30
SECONDS = 60.0

# What was read of one picture; see `read_small` and `read_deep`.
T = TypeVar("T")
Small = tuple[NDArray[np.uint8] | None, bytes, str]
Deep = tuple[NDArray[np.uint8] | None, bytes, str, int]


@dataclass(frozen=True)
class Decoded:
    """N pictures, good and bad.

    pixels: (N, S, S, 3) uint8, zeros where a picture is bad; may be memory-mapped.
    fingerprints: (N, 32) uint8, SHA-256 of the picture as it was before it was resized.
    problems: (N,) text, empty where a picture is good.
    peaks: (N,) int16, the largest value 0 to 255 of a picture that was read from more than 8 bits
        a channel; −1 for any other.
    """

    pixels: NDArray[np.uint8]
    fingerprints: NDArray[np.uint8]
    problems: NDArray[np.str_]
    peaks: NDArray[np.int16]


def decode(
    place: Path, key: str, sources: Sequence[Path | bytes], size: int, told: str = ""
) -> Decoded:
    """Decode `sources` to squares of `size`, or take them from the cache.

    place: what the sources belong to; the cache keeps one result for it and each size.
    key: changes whenever a source does.
    told: a line about the sources, said on standard error before they are decoded.

    Raises:
        DataError: the cache cannot be written.
    """
    where = hashlib.sha256(f"{os.path.realpath(place)!r} {size}".encode()).hexdigest()
    name = f"pictures-{where[:16]}"
    key = f"{_VERSION} {size} {key}"
    found = _read(cache_folder() / name, key)
    if found is not None and not _mended(found, sources, size):
        return found
    with writing(_to_stderr, name) as work:
        found = _read(cache_folder() / name, key)  # another process may have been first
        if found is None or _mended(found, sources, size):
            if told:
                _to_stderr(told)
            found = _decode_all(sources, size, work / "pixels.npy")
            arrays = {name: getattr(found, name) for name in _ARRAYS}
            write_cache({**arrays, "sha256": _check(found, key)}, work, cache_folder() / name)
        # Mapped from where it stays: the working folder goes.
        return _read(cache_folder() / name, key) or found


def _mended(found: Decoded, sources: Sequence[Path | bytes], size: int) -> bool:
    """Whether a picture that could not be read can be now: a right may have been missing, say.

    Those that took too much time or memory are not tried again, which would take it each time.
    """
    pairs = zip(sources, found.problems, strict=True)
    bad = [source for source, problem in pairs if problem and not problem.startswith(TAKES)]
    if not bad:
        return False
    with Readers() as readers:
        return any(pixels is not None for pixels, *_ in readers.read(bad, size))


class Readers:
    """Child processes that decode pictures, at most one a core, started as they are needed."""

    def __enter__(self) -> "Readers":
        count = cores()
        self._pool = ThreadPoolExecutor(count)
        self._workers = [Worker(memory=MEMORY, seconds=SECONDS) for _ in range(count)]
        self._idle: LifoQueue[Worker] = LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)  # Ctrl-C should not wait for the rest
        for worker in self._workers:
            worker.close()

    def read(self, sources: Iterable[Path | bytes], size: int) -> Iterator[Small]:
        """`read_small` of each source, in order."""
        return (found[:3] for found in self.read_deep(sources, size))

    def read_deep(self, sources: Iterable[Path | bytes], size: int) -> Iterator[Deep]:
        """`read_deep` of each source, in order."""
        return self._pool.map(partial(self._read, size), sources)

    def dimensions(self, sources: Iterable[Path | bytes]) -> Iterator[tuple[int, int]]:
        """Width and height of each source, by its header; (0, 0) of one that cannot be read."""
        return self._pool.map(self._dimensions, sources)

    def _read(self, size: int, source: Path | bytes) -> Deep:
        try:
            return self._call(read_deep, source, size)
        except LimitError as error:
            return None, b"", str(error), -1

    def _dimensions(self, source: Path | bytes) -> tuple[int, int]:
        try:
            return self._call(dimensions, source)
        except DataError:
            return 0, 0

    def _call(self, function: Callable[..., T], *args: Any) -> T:
        worker = self._idle.get()  # there are as many as there are threads
        try:
            return worker.call(function, *args)
        finally:
            self._idle.put(worker)


def natural_size(sources: Sequence[Path | bytes]) -> int:
    """The largest of `SIZES` that at least half of the pictures fill with pixels of their own.

    It looks at two hundred of them, evenly chosen.
    """
    with Readers() as readers:
        found = readers.dimensions(sources[:: -(-len(sources) // 200)])
        sides = sorted(min(size) for size in found if size != (0, 0))
    middle = sides[len(sides) // 2] if sides else 0
    return max((size for size in SIZES if size <= middle), default=SIZES[0])


def read_small(source: Path | bytes, size: int) -> Small:
    """(pixels (size, size, 3), fingerprint, ""), or (None, no bytes, what is wrong)."""
    return read_deep(source, size)[:3]


def read_deep(source: Path | bytes, size: int) -> Deep:
    """`read_small`, and the largest value of a picture of more than 8 bits a channel, else −1."""
    try:
        picture, deep = read_measured(source)
    except DataError as error:
        return None, b"", str(error), -1
    peak = int(picture.max()) if deep else -1
    return to_square(picture, size), fingerprint(picture), "", peak


def _decode_all(sources: Sequence[Path | bytes], size: int, file: Path) -> Decoded:
    """Decode on all cores, into a file whose room on the disk is taken first."""
    shape = (len(sources), size, size, 3)
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
    _reserve(file)
    fingerprints = np.zeros((len(sources), 32), np.uint8)
    problems = [""] * len(sources)
    peaks = np.full(len(sources), -1, np.int16)
    with picture_bar(len(sources)) as show, Readers() as readers:
        for i, (small, digest, problem, peak) in enumerate(readers.read_deep(sources, size)):
            problems[i], peaks[i] = problem, peak
            if small is not None:
                pixels[i] = small
                fingerprints[i] = np.frombuffer(digest, np.uint8)
            show(i + 1)
    return Decoded(pixels, fingerprints, np.array(problems, np.str_), peaks)


def _reserve(file: Path) -> None:
    """Take the room of a file with holes; on a full disk, writing into a map kills the process."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as f:
            os.posix_fallocate(f.fileno(), 0, file.stat().st_size)


def _read(folder: Path, key: str) -> Decoded | None:
    try:
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in (*_ARRAYS, "sha256")
        }
    except (OSError, ValueError, EOFError):
        return None
    check = arrays.pop("sha256")
    found = Decoded(**arrays)
    return found if np.array_equal(check, _check(found, key)) else None


def _check(decoded: Decoded, key: str) -> NDArray[np.uint8]:
    digest = hashlib.sha256(key.encode())
    for name in _ARRAYS:
        array = np.ascontiguousarray(getattr(decoded, name))
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return np.frombuffer(digest.digest(), np.uint8)


def picture_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar of the pictures decoded; see `transient_bar`."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    columns = "decoding pictures", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return transient_bar(*columns, total=total)


def _to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
