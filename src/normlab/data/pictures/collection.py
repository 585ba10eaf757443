"""From labelled pictures, some of them bad, to an `ImageData`: the split, and what is wrong.

Folders and parquet files come here. Nothing is skipped unless it was listed and the user said so.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from normlab.core.streams import stream
from normlab.core.text import printable
from normlab.data.images import ImageData
from normlab.data.pictures.decoding import Decoded
from normlab.errors import DataError

DEFAULT_SIZE = 32
TEST_SHARE = 0.2
PARTS = ("train", "test")

Report = Callable[[str], None]


@dataclass(frozen=True)
class Labelled:
    """One picture's class, its name for people, and its part: None to let the rule decide."""

    name: str
    label: str
    part: str | None


@dataclass
class Collection:
    """Pictures and all that is wrong with them.

    classes: names in the order of the labels; classes of no picture are among them.
    problems: (kind, what) in the order in which they were found.
    """

    name: str
    classes: list[str]
    pictures: list[Labelled] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def note(self, kind: str, what: str) -> None:
        self.problems.append((kind, what))


def assemble(
    collection: Collection, decoded: Decoded, *, skip_bad: bool, report: Report | None = None
) -> ImageData:
    """Split, check and arrange decoded pictures.

    Training pictures are interleaved so that any last share of them, which is what a run holds
    out for validation, has all classes in proportion.

    report: takes the summary of what is wrong, line by line; by default standard error does.

    Raises:
        DataError: something is wrong and `skip_bad` is off, or too little is left.
    """
    good = [i for i, problem in enumerate(decoded.problems) if not problem]
    for i, problem in enumerate(decoded.problems):
        if problem:
            collection.note("unusable pictures", f"{collection.pictures[i].name}: {problem}")
    prints = [bytes(row) for row in decoded.fingerprints]
    good = _drop_contradictions(collection, good, prints)
    parts = _split(collection, good, prints)
    _drop_shared(collection, parts, prints)
    classes = _classes_in_both(collection, parts)
    _summarise(collection, skip_bad, report or _to_stderr)
    if len(classes) < 2:
        raise DataError(
            f"{collection.name}: {len(classes)} classes with pictures to train on and to test on; "
            "give a folder for each of two classes or more"
        )
    number = {name: k for k, name in enumerate(classes)}
    arrays = {}
    for part, indices in parts.items():
        kept = [i for i in indices if collection.pictures[i].label in number]
        labels = np.array([number[collection.pictures[i].label] for i in kept], np.int64)
        order = interleave(labels, [prints[i] for i in kept])
        arrays[f"x_{part}"] = decoded.pixels[np.array(kept)[order]]
        arrays[f"y_{part}"] = labels[order]
    return ImageData(name=collection.name, class_names=tuple(classes), **arrays)


def interleave(labels: NDArray[np.int64], keys: Sequence[bytes]) -> NDArray[np.int64]:
    """An order (N,) in which every stretch has the classes in proportion, random within a class.

    It depends on labels and keys alone, not on the order in which they are given.
    """
    place = np.empty(len(labels))
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        own = np.array(sorted(own.tolist(), key=lambda i: keys[i]))
        rank = stream(0, "pictures", "order", int(label)).permutation(len(own))
        place[own] = (rank + 0.5) / len(own)
    return np.lexsort((labels, place))


def _split(
    collection: Collection, good: Iterable[int], prints: Sequence[bytes]
) -> dict[str, list[int]]:
    """Indices of the training and the test pictures.

    Where the parts are not given, a fifth of each class's different pictures, at least one, are
    for testing. Pictures are drawn by their pixels, so names do not matter, and copies of one
    picture stay together.
    """
    parts: dict[str, list[int]] = {part: [] for part in PARTS}
    undecided: dict[str, list[int]] = defaultdict(list)
    for i in good:
        part = collection.pictures[i].part
        (undecided[collection.pictures[i].label] if part is None else parts[part]).append(i)
    for label, indices in undecided.items():
        different = sorted({prints[i] for i in indices})
        order = stream(0, "pictures", "split", label).permutation(len(different))
        count = max(1, round(TEST_SHARE * len(different))) if len(different) > 1 else 0
        test = {different[j] for j in order[:count]}
        for i in indices:
            parts["test" if prints[i] in test else "train"].append(i)
    return parts


def _drop_contradictions(
    collection: Collection, good: list[int], prints: Sequence[bytes]
) -> list[int]:
    """Leave out every copy of a picture that stands in two classes: its label is unknown."""
    copies: dict[bytes, list[int]] = defaultdict(list)
    for i in good:
        copies[prints[i]].append(i)
    contradictory = set()
    for indices in copies.values():
        if len({collection.pictures[i].label for i in indices}) > 1:
            names = " = ".join(collection.pictures[i].name for i in indices)
            collection.note("the same picture in two classes (all copies left out)", names)
            contradictory.update(indices)
    return [i for i in good if i not in contradictory]


def _drop_shared(
    collection: Collection, parts: dict[str, list[int]], prints: Sequence[bytes]
) -> None:
    """Leave out training pictures that are test pictures, too."""
    test = {prints[i]: i for i in parts["test"]}
    kept = []
    for i in parts["train"]:
        if (twin := test.get(prints[i])) is None:
            kept.append(i)
        else:
            names = f"{collection.pictures[i].name} = {collection.pictures[twin].name}"
            collection.note("the same picture in train and test (left out of train)", names)
    parts["train"] = kept


def _classes_in_both(collection: Collection, parts: dict[str, list[int]]) -> list[str]:
    counts = {
        part: Counter(collection.pictures[i].label for i in indices)
        for part, indices in parts.items()
    }
    kept = []
    for name in collection.classes:
        absent = [part for part in PARTS if not counts[part][name]]
        if len(absent) == 2:
            collection.note("classes without a usable picture (left out)", name)
        elif absent:
            collection.note(
                "classes in one part only (left out)",
                f"{name}: no usable picture in {absent[0]}",
            )
        else:
            kept.append(name)
    return kept


def _summarise(collection: Collection, skip_bad: bool, report: Report) -> None:
    """List every problem under its kind.

    Raises:
        DataError: there are any, and they are not to be skipped.
    """
    if not collection.problems:
        return
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, what in collection.problems:
        kinds[kind].append(what)
    report(f"{collection.name}: {len(collection.problems)} problems")
    for kind, whats in kinds.items():
        report(f"  {kind}: {len(whats)}")
        for what in whats:
            report(f"    {what}")
    if not skip_bad:
        raise DataError(
            f"{collection.name}: {len(collection.problems)} problems, listed above; "
            "mend them, or leave those pictures out with --skip-bad"
        )


def _to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
