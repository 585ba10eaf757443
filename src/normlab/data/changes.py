"""What a person decided about pictures: which to leave out, and which have another class.

A decision is a row of a CSV file, as the page of `normlab data check` writes it. The files of the
pictures stay as they are: decisions are applied each time the data are read, and a run keeps them.
"""

import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from normlab.core.files import write_atomic
from normlab.core.places import MOST_TEXT, check_regular
from normlab.data.images import ImageData
from normlab.errors import DataError
from normlab.text import counted, listed, shown

PARTS = ("train", "test", "val")
EXCLUDE, RELABEL, KEEP = "exclude", "relabel", "keep"


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Decisions by the names of pictures; see `picture_names`.

    exclude: names of pictures to leave out.
    relabel: the new class of a picture, by its name.
    sha256: of the files that they were read from, by the option that named the file.
    """

    exclude: tuple[str, ...] = ()
    relabel: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{counted(len(self.exclude), 'picture')} left out, "
            f"{counted(len(self.relabel), 'label')} replaced"
        )

    def check(self, names: Iterable[str], classes: Iterable[str], where: str) -> None:
        """Refuse what matches no picture or no class.

        Raises:
            DataError: such an entry is there.
        """
        known = set(names)
        wanted = dict.fromkeys([*self.exclude, *self.relabel])
        if missing := [name for name in wanted if name not in known]:
            close = get_close_matches(missing[0], known if len(known) < 20_000 else (), n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise DataError(
                f"{where} has no {_pictures(missing)}{hint}: mend or remove "
                f"{counted(len(missing), 'row')} in the file of --exclude or --relabel"
            )
        there = list(classes)
        if new := sorted({label for label in self.relabel.values() if label not in there}):
            raise DataError(
                f"{where} has no class {listed(new, 3)}, which --relabel asks for: "
                f"choose of {listed(there, 8)}"
            )


def _pictures(names: list[str]) -> str:
    return f"picture{'' if len(names) == 1 else 's'} {listed(names, 3)}"


def read_changes(exclude: str | Path | None, relabel: str | Path | None) -> Changes | None:
    """The decisions in two CSV files, or in one that is given for both; None without a file.

    Columns are `file` (the name of a picture), `decision` (exclude, relabel, keep) and `label` (the
    new class). Of a file without `decision`, every row is what the option says. Other columns are
    not looked at.

    Raises:
        DataError: a file cannot be read, lacks a column, contradicts itself, or decides nothing.
    """
    if exclude is None and relabel is None:
        return None
    hashes: dict[str, str] = {}
    leave_out: dict[str, str] = {}
    labels: dict[str, str] = {}
    for option, path, taken in ((EXCLUDE, exclude, leave_out), (RELABEL, relabel, labels)):
        if path is not None:
            text = _text(Path(path))
            hashes[option] = hashlib.sha256(text.encode()).hexdigest()
            taken |= _decided(text, option, shown(path))
    if both := sorted(leave_out.keys() & labels.keys()):
        raise DataError(
            f"{listed(both, 3)}: to be left out by --exclude and to get a class by --relabel; "
            "keep one of the rows"
        )
    return Changes(exclude=tuple(leave_out), relabel=labels, sha256=hashes)


def write_changes(changes: Changes, path: Path) -> None:
    """Write a CSV file in which `read_changes` finds these decisions."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("file", "decision", "label"))
    rows.writerows((name, EXCLUDE, "") for name in changes.exclude)
    rows.writerows((name, RELABEL, label) for name, label in changes.relabel.items())
    write_atomic(path, text.getvalue().encode())


def _text(path: Path) -> str:
    try:
        check_regular(path, follow=True)
        if path.stat().st_size > MOST_TEXT:
            raise DataError(f"{shown(path)} is larger than {MOST_TEXT >> 20} MiB; give fewer rows")
        return path.read_text("utf-8-sig")
    except DataError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise DataError(f"{shown(path)}: {reason}; give a CSV file of decisions") from None


def _decided(text: str, option: str, where: str) -> dict[str, str]:
    """Of the rows that are about `option`, the new class by the picture's name."""
    rows = csv.DictReader(io.StringIO(text))
    try:
        columns = rows.fieldnames or []
    except csv.Error as error:
        raise DataError(f"{where}: {error}; give a CSV file") from None
    needed = ["file", "label"] if option == RELABEL else ["file"]
    if missing := [name for name in needed if name not in columns]:
        raise DataError(
            f"{where}: no column {' and '.join(missing)} for --{option}; its first line is to name "
            "file, decision and label"
        )
    found: dict[str, str] = {}
    try:
        for row in rows:
            decision = (row.get("decision") or ("" if "decision" in columns else option)).strip()
            if decision not in (EXCLUDE, RELABEL, KEEP, ""):
                raise DataError(
                    f"{where}, line {rows.line_num}: the decision {decision!r:.60}; "
                    f"give {EXCLUDE}, {RELABEL} or {KEEP}"
                )
            if decision == option and row["file"]:
                name, label = row["file"], (row.get("label") or "").strip()
                if option == RELABEL and not label:
                    raise DataError(f"{where}, line {rows.line_num}: {name} is given no label")
                if option == RELABEL and found.get(name, label) != label:
                    raise DataError(f"{where}: {name} is given {found[name]} and {label}")
                found[name] = label
    except csv.Error as error:
        raise DataError(f"{where}, line {rows.line_num}: {error}; give a CSV file") from None
    if not found:
        raise DataError(f"{where} has no row that says {option}: nothing would change")
    return found


def picture_names(images: ImageData) -> dict[str, tuple[str, ...]]:
    """The names of a data set's pictures by part, `train`, `test` and perhaps `val`.

    The names of their files; where the pictures are of no files, the part and the place in it:
    `test/45`.
    """
    names: dict[str, tuple[str, ...]] = {}
    for part in PARTS:
        labels = getattr(images, f"y_{part}")
        if labels is not None:
            files: tuple[str, ...] | None = getattr(images, f"files_{part}")
            names[part] = files or tuple(f"{part}/{i}" for i in range(len(labels)))
    return names


def apply_changes(images: ImageData, changes: Changes) -> ImageData:
    """The data with the decisions applied, as new arrays.

    Raises:
        DataError: a decision matches nothing, or a part would be empty.
    """
    names = picture_names(images)
    every = [name for part in names.values() for name in part]
    changes.check(every, images.class_names, images.name)
    number = {name: k for k, name in enumerate(images.class_names)}
    leave_out = set(changes.exclude)
    arrays: dict[str, Any] = {}
    for part, own in names.items():
        kept = np.array([i for i, name in enumerate(own) if name not in leave_out], np.int64)
        if not len(kept):
            raise DataError(f"{images.name}: --exclude leaves no picture in {part}; keep some")
        labels = np.array(getattr(images, f"y_{part}"))
        for i, name in enumerate(own):
            if name in changes.relabel:
                labels[i] = number[changes.relabel[name]]
        arrays[f"x_{part}"] = getattr(images, f"x_{part}")[kept]
        arrays[f"y_{part}"] = labels[kept]
        arrays[f"files_{part}"] = tuple(own[i] for i in kept)
    return replace(images, **arrays)
