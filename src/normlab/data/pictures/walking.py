"""Find picture files below a folder, and say what stands in the way."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Files that systems leave beside pictures. With every name that begins with a dot, these are
# passed over; any other file is taken for a picture.
LITTER = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True)
class Found:
    """A file or folder; `problem` says why it cannot be used, None if nothing is known against."""

    path: Path
    is_folder: bool = False
    problem: str | None = None


def entries(folder: Path) -> Iterator[Found]:
    """What stands in `folder`, links followed, in the order of names; litter is passed over.

    Raises:
        OSError: the folder cannot be read.
    """
    for name in sorted(os.listdir(folder)):
        if not name.startswith(".") and name.lower() not in LITTER:
            yield _look(folder / name)


def walk(folder: Path) -> Iterator[Found]:
    """All files below `folder`, lazily, and every folder that cannot be entered.

    A link to a folder is entered, but no folder twice: with a few links to the folder that they lie
    in there are more ways than time.
    """
    above = []
    for parent in folder.absolute().parents:
        with contextlib.suppress(OSError):  # not ours to look into
            above.append(_identity(parent.stat()))
    yield from _walk(Found(folder, is_folder=True), tuple(above), set())


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _walk(
    place: Found, above: tuple[tuple[int, int], ...], entered: set[tuple[int, int]]
) -> Iterator[Found]:
    try:
        identity = _identity(place.path.stat())
        if identity in above:
            yield Found(place.path, True, "a link in a circle")
            return
        if identity in entered:
            yield Found(place.path, True, "a link to a folder that was read already")
            return
        entered.add(identity)
        found = list(entries(place.path))
    except OSError as error:
        yield Found(place.path, True, f"cannot be read ({error.strerror})")
        return
    for entry in found:
        if entry.is_folder and entry.problem is None:
            yield from _walk(entry, (*above, identity), entered)
        else:
            yield entry


def _look(path: Path) -> Found:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        return Found(path, path.is_dir(), "its name is not UTF-8")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return Found(path, False, "a link in a circle")
        nowhere = path.is_symlink() and error.errno == errno.ENOENT
        reason = "a link that leads nowhere" if nowhere else f"cannot be read ({error.strerror})"
        return Found(path, False, reason)
    if stat.S_ISDIR(mode):
        return Found(path, True)
    return Found(path, False, None if stat.S_ISREG(mode) else "neither a file nor a folder")
