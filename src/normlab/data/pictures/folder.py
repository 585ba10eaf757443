"""Read a folder of pictures in folders named after their classes.

Either `train/CLASS/…` and `test/CLASS/…`, or `CLASS/…` alone, split by the rule in `collection`.
Pictures may lie at any depth below their class.
"""

import json
import os
from pathlib import Path

from normlab.core.text import shown
from normlab.data.images import ImageData
from normlab.data.pictures.collection import DEFAULT_SIZE, PARTS, Collection, Labelled, assemble
from normlab.data.pictures.decoding import decode
from normlab.data.pictures.walking import Found, entries, walk
from normlab.errors import DataError

MOST_PICTURES = 5_000_000  # ImageNet has 1.3 million
_UNREACHABLE = "files and folders that cannot be used"


def read_folder(path: Path, *, image_size: int | None = None, skip_bad: bool = False) -> ImageData:
    """A folder of pictures as data, every picture a square of `image_size` (32 if None).

    Raises:
        DataError: the folder has problems and `skip_bad` is off, or no two classes of pictures.
    """
    size = image_size or DEFAULT_SIZE
    collection = Collection(name=f"{shown(path.resolve().name)}/", classes=[])
    files = _collect(path, collection)
    if not files:
        raise DataError(
            f"{shown(path)} holds no pictures in class folders, nor CIFAR-10; "
            "give train/CLASS/ and test/CLASS/, or CLASS/ alone"
        )
    decoded = decode(path, _key(files), files, size)
    return assemble(collection, decoded, skip_bad=skip_bad)


def _collect(path: Path, collection: Collection) -> list[Path]:
    """Fill `collection` with what stands in the folder; returns the files of its pictures."""
    try:
        top = list(entries(path))
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}; give a readable folder") from error
    names = {entry.path.name for entry in top if entry.is_folder}
    files: list[Path] = []
    if names.isdisjoint(PARTS):
        _collect_classes(path, top, None, collection, files)
    elif names.issuperset(PARTS):
        for entry in top:
            if entry.path.name in PARTS and entry.problem is None:
                _collect_part(path, entry.path, collection, files)
            else:
                reason = entry.problem or "neither in train nor in test"
                collection.note(_UNREACHABLE, f"{shown(entry.path.relative_to(path))}: {reason}")
    else:
        present, absent = PARTS if PARTS[0] in names else PARTS[::-1]
        raise DataError(
            f"{shown(path)} has {present}/ but no {absent}/; give both, or one tree of classes"
        )
    collection.classes.sort()
    return files


def _collect_part(root: Path, part: Path, collection: Collection, files: list[Path]) -> None:
    try:
        found = list(entries(part))
    except OSError as error:
        raise DataError(f"{shown(part)}: {error.strerror}; make it readable") from error
    _collect_classes(root, found, part.name, collection, files)


def _collect_classes(
    root: Path, found: list[Found], part: str | None, collection: Collection, files: list[Path]
) -> None:
    for entry in found:
        name = shown(entry.path.relative_to(root))
        if entry.problem is not None:
            collection.note(_UNREACHABLE, f"{name}: {entry.problem}")
        elif not entry.is_folder:
            collection.note(_UNREACHABLE, f"{name}: not in a folder named after its class")
        else:
            label = entry.path.name
            if label not in collection.classes:
                collection.classes.append(label)
            for file in walk(entry.path):
                name = shown(file.path.relative_to(root))
                if file.problem is not None:
                    collection.note(_UNREACHABLE, f"{name}: {file.problem}")
                else:
                    files.append(file.path)
                    if len(files) > MOST_PICTURES:
                        raise DataError(f"{shown(root)} holds more than {MOST_PICTURES:,} pictures")
                    collection.pictures.append(Labelled(name, label, part))


def _key(files: list[Path]) -> str:
    """Names, sizes and times of the files: a file that changes changes one of them."""
    rows = []
    for file in files:
        status = os.stat(file)
        rows.append((os.fspath(file), status.st_size, status.st_mtime_ns))
    return json.dumps(rows)
