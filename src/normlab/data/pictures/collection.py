"""From labelled pictures, some of them bad, to an `ImageData`: the split, and what is wrong.

Folders and parquet files come here. Damaged pictures, and classes that are not in both parts, stop
it unless the user said otherwise. What a rule can settle (copies of a picture) is settled and said.
"""

import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normlab.core.streams import stream
from normlab.data.changes import Changes
from normlab.data.images import ImageData
from normlab.data.pictures.decoding import Decoded, natural_size
from normlab.data.pictures.grouping import deal, group_order, groups_of
from normlab.data.pictures.naming import canonical
from normlab.data.pictures.sizes import USUAL
from normlab.errors import DataError
from normlab.text import counted, printable, shown

TEST_SHARE = 0.2
PARTS = ("train", "test")
VALIDATION = "validation"
_EXAMPLES = 3  # named of those that are passed over

# Of 16 bits, this part of white or less is what devices of 14 bits or fewer write.
_DIM = 64

Report = Callable[[str], None]


@dataclass(frozen=True)
class Labelled:
    """One picture's class, its name for people, and its part: None to let the rule decide.

    part: "train", "test" or "validation".
    file: where it is, if it is a file of its own.
    """

    name: str
    label: str
    part: str | None
    file: Path | None = None


@dataclass
class Collection:
    """Pictures and all that is wrong with them.

    classes: names in the order of the labels; classes of no picture are among them.
    problems: (kind, what) in the order in which they were found.
    passed: the same of what is left out by a rule.
    notes: lines about what was decided.
    others: names of files that are no pictures.
    natural_size: as `ImageData` has it.
    """

    name: str
    classes: list[str]
    pictures: list[Labelled] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    passed: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    natural_size: int | None = None

    def summary(self, most: int = 10) -> str:
        """Pictures and classes in a line; of more than `most` classes the first ones."""
        counts = Counter(picture.label for picture in self.pictures)
        listed = ", ".join(f"{name} {counts[name]:,}" for name in self.classes[:most])
        more = len(self.classes) - most
        return (
            f"{self.name}: {counted(len(self.pictures), 'picture')} in {len(self.classes)} "
            f"classes: {listed}{f' and {more} more' if more > 0 else ''}"
        )

    def note(self, kind: str, what: str) -> None:
        """A problem, which stops it unless the user said otherwise."""
        self.problems.append((kind, what))

    def pass_over(self, kind: str, what: str) -> None:
        """What is left out by a rule; of one kind some examples are told."""
        self.passed.append((kind, what))


def choose_size(
    collection: Collection, sources: Sequence[Path | bytes], image_size: int | None
) -> int:
    """The size to decode to: `image_size`, or the pictures' own, if that is not above the usual."""
    if image_size is not None:
        return image_size
    collection.natural_size = natural_size(sources)
    return min(collection.natural_size, USUAL)


def settle(collection: Collection, report: Report | None = None) -> None:
    """Settle and say, before pictures are decoded, all that can be known without.

    report: as `assemble` takes it.

    Raises:
        DataError: there are no two classes.
    """
    _settle_parts(collection)
    _join_spellings(collection)
    _tell(collection, report or _to_stderr)
    if not collection.problems:  # which `assemble` lists
        _refuse_one_class(collection, len({picture.label for picture in collection.pictures}))


def assemble(
    collection: Collection,
    decoded: Decoded,
    *,
    skip_bad: bool,
    group_by: str | None = None,
    changes: Changes | None = None,
    report: Report | None = None,
) -> ImageData:
    """Split, check and arrange the decoded pictures of a collection that is settled.

    Training pictures are interleaved so that any last share of them, which is what a run holds
    out for validation, has all classes in proportion.

    group_by: a pattern of names; pictures that are one group by it come into one part. See
        `grouping`.
    changes: pictures to leave out and labels to replace. The other pictures stay in the parts that
        they have without them.
    report: takes the summary of what is wrong, line by line; by default standard error does.

    Raises:
        DataError: something is wrong and `skip_bad` is off, or too little is left.
    """
    report = report or _to_stderr
    names = [picture.name for picture in collection.pictures]
    groups = None if group_by is None else groups_of(names, group_by, collection.notes)
    good = [i for i, problem in enumerate(decoded.problems) if not problem]
    for i, problem in enumerate(decoded.problems):
        if problem:
            collection.note("unusable pictures", f"{collection.pictures[i].name}: {problem}")
    prints = [bytes(row) for row in decoded.fingerprints]
    contradictory = _contradictory(collection, good, prints)
    drawn = _split(collection, [i for i in good if i not in contradictory], prints, groups)
    if changes is not None:
        good = _apply(collection, good, changes)
        contradictory = _contradictory(collection, good, prints)
    _tell_contradictions(collection, contradictory, prints)
    parts = _settled(collection, [i for i in good if i not in contradictory], drawn)
    for part, other in (("train", "test"), (VALIDATION, "test"), ("train", VALIDATION)):
        _drop_shared(collection, parts, part, other, prints)
        if groups is not None:
            _drop_shared_groups(collection, parts, part, other, groups)
    classes = _classes_in_both(collection, parts)
    _note_dim(collection, decoded, good)
    _tell(collection, report)
    _summarise(collection, skip_bad, report)
    _refuse_one_class(collection, len(classes))
    number = {name: k for k, name in enumerate(classes)}
    arrays: dict[str, Any] = {}
    for part, indices in parts.items():
        kept = [i for i in indices if collection.pictures[i].label in number]
        if not kept:  # no validation
            continue
        short = "val" if part == VALIDATION else part
        labels = np.array([number[collection.pictures[i].label] for i in kept], np.int64)
        if groups is None:
            order = interleave(labels, [prints[i] for i in kept])
        else:
            own = np.array([groups[i] for i in kept])
            order = group_order(labels, own)
            if part == "train":
                arrays["groups_train"] = own[order]
        arrays[f"x_{short}"] = decoded.pixels[np.array(kept)[order]]
        arrays[f"y_{short}"] = labels[order]
        arrays[f"files_{short}"] = tuple(collection.pictures[kept[j]].name for j in order)
    return ImageData(
        name=collection.name,
        class_names=tuple(classes),
        natural_size=collection.natural_size,
        **arrays,
    )


def drawn_parts(
    collection: Collection, decoded: Decoded, groups: Sequence[int] | None = None
) -> dict[int, str]:
    """The part of each usable picture, as `assemble` draws it, before anything is left out.

    Copies that stand in two classes, which `assemble` leaves out, count as training pictures.

    groups: the number of each picture's group, no matter if it is usable.
    """
    good = [i for i, problem in enumerate(decoded.problems) if not problem]
    prints = [bytes(row) for row in decoded.fingerprints]
    contradictory = _contradictory(collection, good, prints)
    parts = _split(collection, [i for i in good if i not in contradictory], prints, groups)
    return {i: parts.get(i, collection.pictures[i].part or "train") for i in good}


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


def _refuse_one_class(collection: Collection, count: int) -> None:
    if count < 2:
        raise DataError(
            f"{collection.name}: {count} classes with pictures to train on and to test on; "
            "give a folder for each of two classes or more"
        )


def _settle_parts(collection: Collection) -> None:
    """Use validation for testing where there is no test."""
    if {picture.part for picture in collection.pictures} == {"train", VALIDATION}:
        collection.notes.append("no test: the validation pictures are for testing")
        collection.pictures = [
            replace(picture, part="test" if picture.part == VALIDATION else picture.part)
            for picture in collection.pictures
        ]


def _join_spellings(collection: Collection) -> None:
    """Make one class of names that differ in how a letter is composed, as `é` may be."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for name in (*collection.classes, *(picture.label for picture in collection.pictures)):
        spellings[unicodedata.normalize("NFC", name)].add(name)
    joined = {n: composed for composed, names in spellings.items() if len(names) > 1 for n in names}
    if joined:
        collection.classes = list(dict.fromkeys(joined.get(n, n) for n in collection.classes))
        collection.pictures = [
            replace(picture, label=joined.get(picture.label, picture.label))
            for picture in collection.pictures
        ]


def _split(
    collection: Collection,
    good: Iterable[int],
    prints: Sequence[bytes],
    groups: Sequence[int] | None = None,
) -> dict[int, str]:
    """The part of each picture.

    Where the parts are not given, a fifth of each class's different pictures, at least one, are
    for testing. Pictures are drawn by their pixels, so names do not matter, and copies of one
    picture stay together. With groups, whole groups are drawn.
    """
    parts: dict[int, str] = {}
    undecided: dict[str, list[int]] = defaultdict(list)
    for i in good:
        part = collection.pictures[i].part
        if part is None:
            undecided[collection.pictures[i].label].append(i)
        else:
            parts[i] = part
    if groups is not None:
        return parts | deal(undecided, groups, TEST_SHARE)
    for label, indices in undecided.items():
        different = sorted({prints[i] for i in indices})
        order = stream(0, "pictures", "split", label).permutation(len(different))
        count = max(1, round(TEST_SHARE * len(different))) if len(different) > 1 else 0
        test = {different[j] for j in order[:count]}
        parts |= {i: "test" if prints[i] in test else "train" for i in indices}
    return parts


def _settled(
    collection: Collection, good: list[int], drawn: dict[int, str]
) -> dict[str, list[int]]:
    """Indices of the training, test and validation pictures.

    One that was in no part before labels were changed is for training, if it has no own part.
    """
    parts: dict[str, list[int]] = {part: [] for part in (*PARTS, VALIDATION)}
    for i in good:
        parts[drawn.get(i, collection.pictures[i].part or "train")].append(i)
    return parts


def _apply(collection: Collection, good: list[int], changes: Changes) -> list[int]:
    """Replace labels, and return the pictures that stay.

    Raises:
        DataError: a decision matches no picture or no class.
    """
    pictures = collection.pictures
    changes.check((p.name for p in pictures), collection.classes, collection.name)
    leave_out = set(changes.exclude)
    for i, picture in enumerate(pictures):
        if picture.name in changes.relabel:
            pictures[i] = replace(picture, label=changes.relabel[picture.name])
    return [i for i in good if pictures[i].name not in leave_out]


def _contradictory(collection: Collection, good: list[int], prints: Sequence[bytes]) -> set[int]:
    """Every copy of a picture that stands in two classes: its label is unknown."""
    labels: dict[bytes, set[str]] = defaultdict(set)
    for i in good:
        labels[prints[i]].add(collection.pictures[i].label)
    return {i for i in good if len(labels[prints[i]]) > 1}


def _tell_contradictions(
    collection: Collection, contradictory: set[int], prints: Sequence[bytes]
) -> None:
    copies: dict[bytes, list[str]] = defaultdict(list)
    for i in sorted(contradictory):
        copies[prints[i]].append(collection.pictures[i].name)
    for names in copies.values():
        kind = "the same picture in two classes: all copies left out"
        collection.pass_over(kind, " = ".join(names))


def _drop_shared(
    collection: Collection,
    parts: dict[str, list[int]],
    part: str,
    kept: str,
    prints: Sequence[bytes],
) -> None:
    """Leave out pictures of `part` that are in the part `kept`, too."""
    twins = {prints[i]: i for i in parts[kept]}
    for i in parts[part]:
        if (twin := twins.get(prints[i])) is not None:
            names = f"{collection.pictures[i].name} = {collection.pictures[twin].name}"
            collection.pass_over(
                f"the same picture in {part} and {kept}: left out of {part}", names
            )
    parts[part] = [i for i in parts[part] if prints[i] not in twins]


def _drop_shared_groups(
    collection: Collection,
    parts: dict[str, list[int]],
    part: str,
    kept: str,
    groups: Sequence[int],
) -> None:
    """Leave out pictures of `part` whose group is in the part `kept`, too."""
    there = {groups[i]: i for i in parts[kept]}
    for i in parts[part]:
        if (other := there.get(groups[i])) is not None:
            names = f"{collection.pictures[i].name} with {collection.pictures[other].name}"
            collection.pass_over(f"of one group in {part} and {kept}: left out of {part}", names)
    parts[part] = [i for i in parts[part] if groups[i] not in there]


def _classes_in_both(collection: Collection, parts: dict[str, list[int]]) -> list[str]:
    counts = {
        part: Counter(collection.pictures[i].label for i in indices)
        for part, indices in parts.items()
    }
    kept = []
    for name in collection.classes:
        absent = [part for part in PARTS if not counts[part][name]]
        if len(absent) == 2 and not counts[VALIDATION][name]:
            collection.note("classes without a usable picture (left out)", shown(name))
        elif absent:
            twin = next(
                (other for other in counts[absent[0]] if canonical(other) == canonical(name)), None
            )
            hint = "" if twin is None else f"; {shown(twin)} there is another class by its spelling"
            collection.note(
                "classes in one part only (left out)",
                f"{shown(name)}: no usable picture in {' and '.join(absent)}{hint}",
            )
        else:
            kept.append(name)
    return kept


def _note_dim(collection: Collection, decoded: Decoded, good: list[int]) -> None:
    """Note that 16-bit pictures use a small part of their range: they would be nearly black."""
    peaks = decoded.peaks[good]
    peaks = peaks[peaks >= 0]
    if len(peaks) and (peak := int(peaks.max())) <= _DIM:
        bits, times = (12, 16) if peak <= 16 else (14, 4)
        collection.notes.append(
            f"all {len(peaks):,} pictures of 16 bits stay below {(peak + 1) / 2.56:.0f} % of white "
            f"and are nearly black, with {peak + 1} levels left: multiply their values first, "
            f"by {times} if they hold {bits} bits"
        )


def _tell(collection: Collection, report: Report) -> None:
    """Say in one line each what was decided, and what was left out by a rule, and only once."""
    for line in collection.notes:
        report(f"{collection.name}: {line}")
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, what in collection.passed:
        kinds[kind].append(what)
    for kind, whats in kinds.items():
        more = f" and {len(whats) - _EXAMPLES:,} more" if len(whats) > _EXAMPLES else ""
        report(f"{collection.name}: {kind}: {', '.join(whats[:_EXAMPLES])}{more}")
    collection.notes, collection.passed = [], []


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
    report(f"{collection.name}: {counted(len(collection.problems), 'problem')}")
    for kind, whats in kinds.items():
        report(f"  {kind}: {len(whats)}")
        for what in whats:
            report(f"    {what}")
    if not skip_bad:
        raise DataError(
            f"{collection.name}: {counted(len(collection.problems), 'problem')}, listed above; "
            "mend them, or leave those pictures out with --skip-bad"
        )


def _to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
