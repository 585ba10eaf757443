"""Folders of `.npy` files in this machine's cache, each written once and whole.

A folder appears by a single rename, complete and flushed, or not at all. Writers hold a lock that
the system frees when a process dies; readers need none.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.errors import DataError

_PARTIAL = ".partial-"
_LOCK_WAIT = 5400.0  # seconds; more than all sources together may take by default

Report = Callable[[str], None]


def cache_folder() -> Path:
    """`NORMLAB_CACHE` if set, else the platform's folder for caches."""
    if chosen := os.environ.get("NORMLAB_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("normlab"))


@contextmanager
def writing(report: Report, name: str) -> Iterator[Path]:
    """The right to write the folder `name` of the cache, and one to work in, gone afterwards."""
    root, partial = cache_folder(), f"{_PARTIAL}{name}-"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{name}.lock", report):
            for stray in root.glob(f"{partial}*"):  # of a process that was killed
                shutil.rmtree(stray, ignore_errors=True)
            work = Path(tempfile.mkdtemp(dir=root, prefix=partial))
            try:
                yield work
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write the cache {root}: {error.strerror or error}; "
            "make room there or set NORMLAB_CACHE to another folder"
        ) from error


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            report(f"another process is writing {path.stem} to the cache; waiting for it")
            lock.acquire(timeout=_LOCK_WAIT)
    except filelock.Timeout:
        raise DataError(
            f"another process has held {path} for {_LOCK_WAIT / 60:.0f} minutes; end it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_cache(arrays: Mapping[str, NDArray[Any]], work: Path, folder: Path) -> None:
    """Write and flush all files in a folder beside the final one, then rename it."""
    new = work / "new"
    new.mkdir()
    for name, array in arrays.items():
        with (new / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    _flush_folder(new)
    if folder.exists():  # damaged, or about to be replaced by the same; readers keep their maps
        folder.rename(work / "old")
    new.rename(folder)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
