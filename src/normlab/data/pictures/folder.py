"""Read a folder of pictures in folders named after their classes; `layout` says which those are."""

import json
import os
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path

from normlab.data.pictures.collection import Collection, Labelled, choose_size, settle
from normlab.data.pictures.decoding import Decoded, decode
from normlab.data.pictures.layout import WILD, Layout, arrange, match
from normlab.data.pictures.naming import ending
from normlab.data.pictures.walking import Tree, grow
from normlab.errors import DataError
from normlab.text import shown

MOST_PICTURES = 5_000_000  # ImageNet has 1.3 million
_UNREACHABLE = "files and folders that cannot be used"


def read_folder(path: Path, *, image_size: int | None = None) -> tuple[Collection, Decoded]:
    """The pictures of a folder, every one a square of `image_size`, before anything is left out.

    image_size: None for `natural_size`.

    path: the folder, or a pattern with * in its last parts that names the folders of the classes.

    Raises:
        DataError: no two classes of pictures, or two likely readings of the folder.
    """
    tree, patterns = _tree(path)
    layout = match(tree, patterns) if patterns else arrange(tree)
    collection = Collection(name=f"{shown(path.resolve().name)}/", classes=[])
    files = _collect(layout, collection)
    _tell_others(tree, layout, collection)
    if not files:
        raise DataError(
            f"{shown(path)} holds no pictures in class folders, nor CIFAR-10; "
            "give train/CLASS/ and test/CLASS/, or CLASS/ alone"
        )
    settle(collection)
    size = choose_size(collection, files, image_size)
    decoded = decode(path, _key(files), files, size, collection.summary())
    return collection, decoded


def is_pattern(path: Path) -> bool:
    """Whether `path` names folders by a pattern."""
    return any(sign in os.fspath(path) for sign in WILD) and not path.exists()


def _tree(path: Path) -> tuple[Tree, tuple[str, ...]]:
    """All that is below a folder, and the patterns that follow its name."""
    root = path
    if is_pattern(path):
        while is_pattern(root):
            root = root.parent
    try:
        os.listdir(root)
    except OSError as error:
        raise DataError(f"{shown(root)}: {error.strerror}; give a readable folder") from error
    return grow(root), path.parts[len(root.parts) :] if root != path else ()


def _collect(layout: Layout, collection: Collection) -> list[Path]:
    """Fill `collection` with the pictures of all classes; returns their files."""
    files: list[Path] = []
    for folder in layout.classes:
        if folder.label not in collection.classes:
            collection.classes.append(folder.label)
        for tree in folder.tree.every():
            for file in tree.pictures:
                name = shown(file.relative_to(layout.root))
                files.append(file)
                collection.pictures.append(Labelled(name, folder.label, folder.part, file))
    for found in layout.problems:
        name = shown(found.path.relative_to(layout.root))
        collection.note(_UNREACHABLE, f"{name}: {found.problem}")
    collection.classes.sort()
    return files


def _tell_others(tree: Tree, layout: Layout, collection: Collection) -> None:
    """Note what is passed over or was decided, each in one line."""
    collection.notes += layout.notes
    files = [file for folder in tree.every() for file in folder.others]
    collection.others = [shown(file.relative_to(layout.root)) for file in files]
    if others := [file.name for file in files]:
        kinds = Counter(ending(name) or name for name in others).most_common()
        listed = ", ".join(f"{count:,} {shown(kind)}" for kind, count in kinds[:3])
        more = ", …" if len(kinds) > 3 else ""
        collection.notes.append(f"passed over files that are no pictures: {listed}{more}")
    for empty in (f for level in layout.levels for f in level.folders if not f.count):
        collection.pass_over("folders without pictures", layout.where(empty))
    for picture in layout.loose:
        collection.pass_over(
            "pictures in no folder of a class are passed over",
            shown(picture.relative_to(layout.root)),
        )
    _tell_namesakes(layout, collection)


def _tell_namesakes(layout: Layout, collection: Collection) -> None:
    """Note pictures that stand twice in a folder, as `a.jpg` and `a.png`: masks, or copies."""
    pairs: list[list[str]] = []
    count = 0
    for tree in (t for folder in layout.classes for t in folder.tree.every()):
        stems: dict[str, list[str]] = defaultdict(list)
        for file in tree.pictures:
            stems[file.stem].append(file.name)
        count += len(stems)
        pairs += [names for names in stems.values() if len(names) > 1]
    if len(pairs) > 1 and 2 * len(pairs) > count:
        collection.notes.append(
            f"{len(pairs):,} pictures have a namesake ({shown(' and '.join(pairs[0]))}): if those "
            "are masks or copies, take them away, since they may give the class away"
        )


def _key(files: list[Path]) -> str:
    """Names, sizes and times of the files: a file that changes changes one of them.

    So does a reader of HEIC that was not there before.
    """
    rows: list[object] = [find_spec("pillow_heif") is not None]
    for file in files:
        status = os.stat(file)
        rows.append((os.fspath(file), status.st_size, status.st_mtime_ns))
    return json.dumps(rows)
