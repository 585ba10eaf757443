"""Which folders are the parts and the classes of a data set, as other people arrange them.

The rules, in this order, from the top folder down:

1. Folders called train, test or validation, in any usual spelling, that hold folders of classes are
   the parts. Where there is no test, validation is used for testing. train alone is one tree.
2. A folder that is the only one with pictures, or the only one that is called data or images and
   the like and holds folders of classes, is entered.
3. Otherwise each folder with pictures is a class, with all that is below it. `CLASS/train/…` and
   `CLASS/test/…` are parts, too.

What these rules pass over or decide is said in one line. Where two readings are likely, both are
named and neither is taken; a pattern (`tree/*/*`) then says which folders are the classes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from normlab.data.pictures.naming import (
    canonical,
    is_beside,
    is_wrapper,
    part_of,
    resembles_litter,
    resembles_part,
)
from normlab.data.pictures.walking import Found, Tree
from normlab.errors import DataError
from normlab.text import shown

WILD = "*?["
_SHOWN = 5


@dataclass(frozen=True)
class ClassFolder:
    """A folder that holds pictures of one class, for one part: None to let a rule decide."""

    label: str
    part: str | None
    tree: Tree


@dataclass
class Layout:
    """The folders of classes, and what is to be said of the rest.

    levels: the folders above the classes' on the way from the top; what is in them and in no
        other folder belongs to no class.
    notes: lines about what was decided or passed over.
    """

    root: Path
    classes: list[ClassFolder] = field(default_factory=list)
    levels: list[Tree] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def loose(self) -> list[Path]:
        """Pictures that are in no class's folder."""
        return [picture for level in self.levels for picture in level.pictures]

    @property
    def problems(self) -> list[Found]:
        """What cannot be used, in the classes' folders and above them."""
        trees = [*self.levels, *(t for c in self.classes for t in c.tree.every())]
        return [problem for tree in trees for problem in tree.problems]

    def where(self, tree: Tree) -> str:
        """A folder's name below the top, for people."""
        return f"{shown(tree.path.relative_to(self.root))}/"

    def pass_over(self, trees: Iterable[Tree], reason: str) -> None:
        """Say that folders are left aside."""
        for tree in trees:
            self.notes.append(f"passed over {self.where(tree)} ({tree.count:,} pictures): {reason}")


def arrange(root: Tree) -> Layout:
    """Find the classes below a folder by the rules above.

    Raises:
        DataError: there are two likely readings, or no folder of a class.
    """
    layout = Layout(root.path)
    place: Tree | None = root
    while place is not None:
        layout.levels.append(place)
        if _take_parts(layout, place):
            break
        inner = _inner(layout, place)
        if inner is None:
            _take_classes(layout, place)
            break
        place = inner
    _refuse_two_levels(layout)
    return layout


def match(root: Tree, patterns: tuple[str, ...]) -> Layout:
    """The classes are the folders that the patterns name, one for each level below `root`.

    Raises:
        DataError: there is no such folder, or some are in a part and others are not.
    """
    layout = Layout(root.path, levels=[root])
    found: list[tuple[str | None, Tree]] = [(None, root)]
    for depth, pattern in enumerate(patterns):
        inner = [
            (part or (part_of(tree.name) if depth else None), folder)
            for part, tree in found
            for folder in tree.filled
            if fnmatchcase(folder.name, pattern)
        ]
        if depth:
            layout.levels += [tree for _, tree in found]
        found = inner
    parts = {part for part, _ in found}
    if None in parts and len(parts) > 1:
        raise DataError(
            f"{shown(root.path)}: some folders of {'/'.join(patterns)} are in train or test and "
            "others are not; give a pattern that names the ones or the others"
        )
    layout.classes = [ClassFolder(tree.name, part, tree) for part, tree in found]
    return layout


def _holds_classes(tree: Tree) -> bool:
    """Whether most pictures of a folder are in folders of its own."""
    return len(tree.pictures) * 2 < tree.count


def _split(trees: Iterable[Tree]) -> tuple[dict[str, list[Tree]], list[Tree], list[Tree]]:
    """Folders by the parts they are, those that only have a part's name, and all others."""
    parts: dict[str, list[Tree]] = defaultdict(list)
    flat, others = [], []
    for tree in trees:
        part = part_of(tree.name)
        if part is None:
            others.append(tree)
        elif _holds_classes(tree):
            parts[part].append(tree)
        else:
            flat.append(tree)
    return parts, flat, others


def _take_parts(layout: Layout, place: Tree) -> bool:
    """Take `place` apart if it holds train/ and the like; whether it does."""
    parts, flat, others = _split(place.filled)
    if not parts:
        return False
    for trees in parts.values():
        if len(trees) > 1:
            raise DataError(
                f"{_shown(layout, place)} has {_names(trees)}, which are one part by their names; "
                "keep one of them, or put their pictures together"
            )
    if "train" not in parts:
        if others:
            _two_readings(layout, place, next(iter(parts.values()))[0])
        raise DataError(
            f"{_shown(layout, place)} has {_names(t[0] for t in parts.values())} but no train/; "
            "give train/ and test/, or one tree of classes"
        )
    train = parts["train"][0]
    if len(parts) == 1 and any(not _belongs(t) and not _holds_classes(t) for t in others):
        _two_readings(layout, place, train)
    layout.pass_over(flat, "no folders of classes in it, so its classes are not known")
    layout.pass_over(others, f"beside {train.name}/, and no part by its name")
    if len(parts) == 1:
        layout.notes.append(f"{layout.where(train)} stands alone: a part of it is for testing")
    for part, trees in parts.items():
        inner = _unwrapped(layout, trees[0])
        for tree in inner.filled:
            layout.classes.append(ClassFolder(tree.name, None if len(parts) == 1 else part, tree))
    return True


def _belongs(tree: Tree) -> bool:
    """Whether a folder is, by its name, no class but something beside the data."""
    return resembles_part(tree.name) or is_beside(tree.name) or is_wrapper(tree.name)


def _unwrapped(layout: Layout, part: Tree) -> Tree:
    """The folder of a part that holds its classes: `train/train/…`, `train/images/…`."""
    layout.levels.append(part)
    wrappers = [t for t in part.filled if is_wrapper(t.name) or part_of(t.name) is not None]
    beside = [t for t in part.filled if is_beside(t.name)]
    if len(wrappers) == 1 and len(wrappers) + len(beside) == len(part.filled):
        if not _holds_classes(wrappers[0]):
            raise DataError(
                f"{shown(part.path / wrappers[0].name)} holds pictures and no folders of classes; "
                "labels in files of their own are not read: "
                "put each picture in a folder named after its class"
            )
        layout.pass_over(beside, f"beside {wrappers[0].name}/")
        return _unwrapped(layout, wrappers[0])
    return part


def _inner(layout: Layout, place: Tree) -> Tree | None:
    """The folder that holds the data, if that is not `place`."""
    filled = place.filled
    if len(filled) == 1:
        return filled[0] if _holds_classes(filled[0]) else None
    wrappers = [t for t in filled if is_wrapper(t.name) and _holds_classes(t)]
    if len(wrappers) != 1:
        return None
    others = [tree for tree in filled if tree is not wrappers[0]]
    if not all(_belongs(tree) for tree in others):
        _two_readings(layout, place, wrappers[0])
    layout.pass_over(others, f"beside {wrappers[0].name}/")
    return wrappers[0]


def _take_classes(layout: Layout, place: Tree) -> None:
    """Each folder of `place` is a class."""
    filled = place.filled
    if _take_parts_in_classes(layout, filled):
        return
    if filled and all(resembles_part(tree.name) for tree in filled):
        raise DataError(
            f"{_shown(layout, place)} has {_names(filled)} without folders of classes in them; "
            "put each picture in a folder named after its class, or, if these are the classes, "
            f"give '{shown(place.path / '*')}'"
        )
    if filled and all(is_wrapper(tree.name) or is_beside(tree.name) for tree in filled):
        raise DataError(
            f"{_shown(layout, place)} has {_names(filled)}, by their names pictures and what "
            "belongs to them; put each picture in a folder named after its class, or, if these "
            f"are the classes, give '{shown(place.path / '*')}'"
        )
    odd = [t for t in filled if resembles_part(t.name) or resembles_litter(t.name)]
    if odd:
        layout.notes.append(f"taken for classes, though their names may mean more: {_names(odd)}")
    layout.classes += [ClassFolder(tree.name, None, tree) for tree in filled]


def _take_parts_in_classes(layout: Layout, filled: list[Tree]) -> bool:
    """Take `CLASS/train/…`, `CLASS/test/…` apart, if that is what all folders are."""
    inner = [(tree, part_of(folder.name), folder) for tree in filled for folder in tree.filled]
    parts = {part for _, part, _ in inner}
    if None in parts or "train" not in parts or len(parts) < 2 or any(t.pictures for t in filled):
        return False
    layout.levels += filled
    layout.classes += [ClassFolder(tree.name, part, folder) for tree, part, folder in inner]
    return True


def _refuse_two_levels(layout: Layout) -> None:
    """Refuse a tree in which the classes may be the folders, or the folders in them.

    These are likely where no folder holds pictures itself, at least half hold several folders, and
    no two of those have one name. Shared names (of days, people, cameras) do not look like classes,
    nor do numbers.
    """
    tops = [c.tree for c in layout.classes if c.part in (None, "train")]
    if any(tree.pictures for tree in tops):
        return
    names = [[canonical(folder.name) for folder in tree.filled] for tree in tops]
    counts = Counter(name for inner in names for name in inner)
    several = sum(len(inner) > 1 for inner in names)
    worded = any(c.isalpha() for name in counts for c in name)
    if not tops or 2 * several < len(tops) or max(counts.values()) > 1 or not worded:
        return
    place = tops[0].path.parent
    if layout.classes[0].part is not None:
        place = place.parent / "*"
    lower = [folder for tree in tops for folder in tree.filled]
    raise DataError(
        f"{shown(layout.root)}: are the classes {_names(tops)} or the folders in them, "
        f"{_names(lower)}? Give '{shown(place / '*')}' for the first, "
        f"'{shown(place / '*' / '*')}' for the second"
    )


def _two_readings(layout: Layout, place: Tree, tree: Tree) -> NoReturn:
    raise DataError(
        f"{_shown(layout, place)}: are the classes {_names(place.filled)} or the folders in "
        f"{tree.name}/, {_names(tree.filled)}? Give '{shown(place.path / '*')}' for the first, "
        f"'{shown(tree.path / '*')}' for the second"
    )


def _shown(layout: Layout, place: Tree) -> str:
    return shown(place.path)


def _names(trees: Iterable[Tree]) -> str:
    names = [f"{shown(tree.name)}/" for tree in trees]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
