"""Read pictures from parquet as Hugging Face's data sets have them.

A row has a picture, `img` or `image` (a file's bytes, or a struct with `bytes`), and a `label`: a
number or a text. Class names come from the metadata that the `datasets` library writes.
"""

import json
from pathlib import Path
from typing import Any

from normlab.core.sandbox import LimitError, limited
from normlab.core.text import shown
from normlab.data.images import ImageData
from normlab.data.pictures.collection import DEFAULT_SIZE, PARTS, Collection, Labelled, assemble
from normlab.data.pictures.decoding import decode
from normlab.errors import DataError, UserError

PICTURE_COLUMNS = ("img", "image")
SECONDS = 600.0  # for one file


def parquet_files(path: Path) -> list[Path]:
    """The parquet files of `path`: itself, or those in a folder or in its folder `data`."""
    if not path.is_dir():
        return [path] if path.suffix == ".parquet" else []
    return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))


def read_parquet(path: Path, *, image_size: int | None = None, skip_bad: bool = False) -> ImageData:
    """A parquet file, or a folder with `train*.parquet` and `test*.parquet`, as data.

    A single file, or files of no such names, are split by the rule in `collection`. The files'
    pictures are held in memory, compressed as they are, while they are decoded.

    Raises:
        UserError: pyarrow is not installed.
        DataError: not such a file, problems and `skip_bad` is off, or no two classes.
    """
    files = parquet_files(path)
    parts = [_part(file) for file in files]
    if set(parts) != {None} and set(parts) != set(PARTS):
        raise DataError(
            f"{shown(path)} has {', '.join(shown(file.name) for file in files)}; "
            "give train*.parquet and test*.parquet and no others, or one file"
        )
    collection = Collection(name=shown(path.resolve().name), classes=[])
    contents: list[bytes] = []
    key = []
    for file, part in zip(files, parts, strict=True):
        status = file.stat()
        key.append((str(file), status.st_size, status.st_mtime_ns))
        _collect(file, part, collection, contents)
    if not contents:
        raise DataError(f"{shown(path)} has no rows with a picture and a label; give another file")
    decoded = decode(path, json.dumps(key), contents, image_size or DEFAULT_SIZE)
    return assemble(collection, decoded, skip_bad=skip_bad)


def _part(file: Path) -> str | None:
    return next((part for part in PARTS if file.name.startswith(part)), None)


def _collect(file: Path, part: str | None, collection: Collection, contents: list[bytes]) -> None:
    """Add a file's rows; a row without picture or label is a problem."""
    memory = (1 << 30) + 8 * file.stat().st_size
    try:
        names, pictures, labels = limited(read_rows, file, memory=memory, seconds=SECONDS)
    except LimitError as error:
        raise LimitError(f"{shown(file)}: {error}") from None
    for row, (content, label) in enumerate(zip(pictures, labels, strict=True)):
        where = f"{shown(file.name)} row {row}"
        name = _label(label, names)
        if content is None or name is None:
            missing = "label" if content is not None else "picture"
            collection.note("rows that cannot be used", f"{where}: no {missing} ({label!r:.80})")
            continue
        contents.append(content)
        collection.pictures.append(Labelled(where, name, part))
    found = {picture.label for picture in collection.pictures}
    ordered = names or sorted(found, key=lambda n: (n.isdigit(), len(n) if n.isdigit() else 0, n))
    collection.classes = list(dict.fromkeys([*collection.classes, *ordered]))


def read_rows(file: Path) -> tuple[list[str], list[bytes | None], list[Any]]:
    """Names of the classes, if the file has them, and of each row the picture and the label.

    Raises:
        UserError: pyarrow is not installed.
        DataError: not such a file.
    """
    table, column = _table(file)
    names = _class_names(table.schema.metadata or {})
    labels = [_plain(value) for value in table.column("label").to_pylist()]
    pictures = []
    for picture in table.column(column).to_pylist():
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        pictures.append(content if isinstance(content, bytes) else None)
    return names, pictures, labels


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int) else None if value is None else repr(value)[:80]


def _label(value: Any, names: list[str]) -> str | None:
    """A class's name; None for no label, which Hugging Face writes as -1."""
    if isinstance(value, str):
        return value
    if not isinstance(value, int) or value < 0 or (names and value >= len(names)):
        return None
    return names[value] if names else str(value)


def _table(file: Path) -> tuple[Any, str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{shown(file)}: reading parquet needs pyarrow; pip install 'normlab[parquet]'"
        ) from None
    try:
        schema = pyarrow.parquet.read_schema(file)
        column = next((name for name in PICTURE_COLUMNS if name in schema.names), None)
        if column is None or "label" not in schema.names:
            raise DataError(
                f"{shown(file)} has the columns {', '.join(schema.names)}; "
                "give img or image, and label"
            )
        return pyarrow.parquet.read_table(file, columns=[column, "label"]), column
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{shown(file)}: not a readable parquet file ({reason})") from error


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """The names of a `ClassLabel`, if there are any."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return []
