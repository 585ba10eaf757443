"""All pictures of a data set as they are found, before anything is left out of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normlab.data import ImageData, load
from normlab.data.changes import picture_names
from normlab.data.loading import gather, own_pictures
from normlab.errors import DataError

SHORT = {"train": "train", "test": "test", "validation": "val"}


@dataclass(frozen=True, eq=False)
class Pictures:
    """N pictures, in all parts of a data set.

    pixels: (N, S, S, 3) uint8; labels: (N,); parts: N of `train`, `test`, `val`.
    names: N names, by which decisions are made; see `normlab.data.changes`.
    prints: N, equal where two pictures are equal before they are brought to one size.
    files: N files, None for a picture that is none of its own.
    passed: what is no usable picture, (name, why).
    group_by, groups: the pattern of names that says which pictures belong together, and the number
        of each one's group (N,); or None.
    """

    name: str
    class_names: tuple[str, ...]
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: Sequence[str]
    parts: Sequence[str]
    prints: Sequence[bytes]
    files: Sequence[Path | None]
    passed: list[tuple[str, str]] = field(default_factory=list)
    group_by: str | None = None
    groups: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def joined(self, same: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers (N,), equal for pictures that `same` (N,), values below N, or a group joins."""
        if self.groups is None:
            return same
        from scipy.sparse import coo_array  # deferred: it takes time to load
        from scipy.sparse.csgraph import connected_components

        n, joins = len(self), np.ones(len(self), bool)
        graph = coo_array((joins, (same, n + self.groups)), (2 * n, 2 * n))
        number: NDArray[np.int64] = connected_components(graph, directed=False)[1][same]
        return number


def read_pictures(
    data: str | Path | None, image_size: int | None = None, group_by: str | None = None
) -> Pictures:
    """The pictures of what `normlab.data.load` takes.

    Raises:
        DataError: as `load` does, but damaged pictures are passed over and listed.
    """
    folder = own_pictures(data)
    if folder is None:
        return from_images(load(data, group_by=group_by))
    return _from_folder(folder, image_size, group_by)


def from_images(images: ImageData) -> Pictures:
    """The pictures of data that are loaded."""
    names = picture_names(images)
    pixels = np.concatenate([getattr(images, f"x_{part}") for part in names])
    return Pictures(
        name=images.name,
        class_names=images.class_names,
        pixels=pixels,
        labels=np.concatenate([getattr(images, f"y_{part}") for part in names]).astype(np.int64),
        names=[name for own in names.values() for name in own],
        parts=[part for part, own in names.items() for _ in own],
        prints=[hashlib.sha256(picture.tobytes()).digest() for picture in pixels],
        files=[None] * len(pixels),
    )


def _from_folder(path: Path, image_size: int | None, group_by: str | None) -> Pictures:
    from normlab.data.pictures.collection import drawn_parts
    from normlab.data.pictures.grouping import groups_of

    collection, decoded = gather(path, image_size)
    names = [picture.name for picture in collection.pictures]
    groups = None if group_by is None else groups_of(names, group_by, [])
    parts = drawn_parts(collection, decoded, groups)
    good = sorted(parts)
    if not good:
        raise DataError(f"{collection.name} holds no picture that can be read; give another folder")
    labelled = [collection.pictures[i] for i in good]
    number = {name: k for k, name in enumerate(collection.classes)}
    unusable = [
        (picture.name, str(problem))
        for picture, problem in zip(collection.pictures, decoded.problems, strict=True)
        if problem
    ]
    return Pictures(
        name=collection.name,
        class_names=tuple(collection.classes),
        pixels=decoded.pixels[good],
        labels=np.array([number[picture.label] for picture in labelled], np.int64),
        names=[picture.name for picture in labelled],
        parts=[SHORT[parts[i]] for i in good],
        prints=[bytes(decoded.fingerprints[i]) for i in good],
        files=[picture.file for picture in labelled],
        passed=[
            *unusable,
            *((what, kind) for kind, what in collection.problems),
            *((name, "no picture") for name in collection.others),
        ],
        group_by=group_by,
        groups=None
        if groups is None
        else np.unique(np.array(groups)[good], return_inverse=True)[1],
    )
