"""Find picture files below a folder, and say what stands in the way."""

import contextlib
import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from normlab.data.pictures.naming import ENDINGS, UNREAD, ending, is_litter
from normlab.data.pictures.reading import begins_as_picture

# A folder that links lead to may be entered this often; links that multiply would never end.
_VISITS = 16
_DEPTH = 200  # folders in folders, from the root of the disk

_Identity = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """A file or folder; `problem` says why it cannot be used, None if nothing is known against."""

    path: Path
    is_folder: bool = False
    problem: str | None = None


@dataclass
class Tree:
    """A folder, and what stands in it.

    pictures: the files that are pictures by their names or their first bytes.
    others: files that are no pictures.
    folders: those in it that can be entered.
    problems: what cannot be used, and why.
    """

    path: Path
    pictures: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    folders: list["Tree"] = field(default_factory=list)
    problems: list[Found] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def count(self) -> int:
        """How many pictures are in it, at any depth."""
        return len(self.pictures) + sum(folder.count for folder in self.folders)

    @property
    def filled(self) -> list["Tree"]:
        """The folders in it that hold pictures, at any depth."""
        return [folder for folder in self.folders if folder.count]

    def every(self) -> Iterator["Tree"]:
        """This folder and all below it."""
        yield self
        for folder in self.folders:
            yield from folder.every()


def entries(folder: Path) -> Iterator[Found]:
    """What stands in `folder`, links followed, in the order of names; litter is passed over.

    Raises:
        OSError: the folder cannot be read.
    """
    for name in sorted(os.listdir(folder)):
        if not is_litter(name):
            yield _look(folder / name)


def walk(folder: Path) -> Iterator[Found]:
    """All files below `folder`, lazily, and every folder that cannot be entered.

    A link to a folder is entered, but no folder twice: with a few links to the folder that they lie
    in there are more ways than time.
    """
    yield from _walk(Found(folder, is_folder=True), _above(folder), Counter())


def grow(folder: Path) -> Tree:
    """Everything below `folder`, with pictures told from other files; see `walk`."""
    return _grow(folder, _above(folder), Counter())


def is_picture(file: Path) -> bool:
    """Whether a file is a picture, good or damaged, by its name or by its first bytes."""
    known = ending(file.name)
    return known in ENDINGS or known in UNREAD or begins_as_picture(file)


def _above(folder: Path) -> tuple[_Identity, ...]:
    above = []
    for parent in folder.absolute().parents:
        with contextlib.suppress(OSError):  # not ours to look into
            above.append(_identity(parent.stat()))
    return tuple(above)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _enter(
    folder: Path, above: tuple[_Identity, ...], visits: "Counter[_Identity]"
) -> tuple[list[Found], tuple[_Identity, ...]] | Found:
    """What stands in a folder and the way to it, or why it cannot be entered."""
    try:
        identity = _identity(folder.stat())
        if identity in above:
            return Found(folder, True, "a link in a circle")
        visits[identity] += 1
        if visits[identity] > _VISITS:
            return Found(folder, True, f"links lead to it more than {_VISITS} times")
        if len(above) > _DEPTH:
            return Found(folder, True, "too many folders in folders")
        return list(entries(folder)), (*above, identity)
    except OSError as error:
        return Found(folder, True, f"cannot be read ({error.strerror})")


def _walk(
    place: Found, above: tuple[_Identity, ...], visits: "Counter[_Identity]"
) -> Iterator[Found]:
    entered = _enter(place.path, above, visits)
    if isinstance(entered, Found):
        yield entered
        return
    for entry in entered[0]:
        if entry.is_folder and entry.problem is None:
            yield from _walk(entry, entered[1], visits)
        else:
            yield entry


def _grow(folder: Path, above: tuple[_Identity, ...], visits: "Counter[_Identity]") -> Tree:
    tree = Tree(folder)
    entered = _enter(folder, above, visits)
    if isinstance(entered, Found):
        tree.problems.append(entered)
        return tree
    for entry in entered[0]:
        if entry.problem is not None:
            tree.problems.append(entry)
        elif entry.is_folder:
            tree.folders.append(_grow(entry.path, entered[1], visits))
        elif is_picture(entry.path):
            tree.pictures.append(entry.path)
        else:
            tree.others.append(entry.path)
    return tree


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
