"""Read pictures from parquet as Hugging Face's data sets have them.

A row has a picture, `img` or `image` (a file's bytes, or a struct with `bytes`), and a `label`: a
number or a text. Class names come from the metadata that the `datasets` library writes.

All files of a folder share one budget of memory, which is counted before a row becomes an object:
a few kilobytes of parquet can claim gigabytes by naming one picture often.
"""

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from normlab.core.sandbox import LimitError, limited
from normlab.data.pictures.collection import Collection, Labelled, choose_size, settle
from normlab.data.pictures.decoding import Decoded, decode
from normlab.data.pictures.naming import part_of
from normlab.errors import DataError, UserError, install
from normlab.text import shown

PICTURE_COLUMNS = ("img", "image")
SECONDS = 600.0  # for one file
MOST = 100_000  # files of a set
SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.)")

# What all files together may unpack to: this many times their size, or this many bytes. Pictures
# are compressed already, so real ones do not shrink further.
MAX_RATIO = 4
MAX_UNSUSPECTED = 256 << 20
_GAPS = ("", "nan", "NaN", "<NA>")  # what programs write for no text
_ROW = 256  # bytes that a row takes besides its picture and its label


def parquet_files(path: Path) -> list[Path]:
    """The parquet files of `path`: itself, or those in a folder or in its folder `data`."""
    if not path.is_dir():
        return [path] if path.suffix == ".parquet" else []
    return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))


def read_parquet(path: Path, *, image_size: int | None = None) -> tuple[Collection, Decoded]:
    """The pictures of a parquet file, or of a folder with `train*.parquet` and `test*.parquet`.

    There may be `validation*.parquet`, too. A single file, or files of no such names, are split by
    the rule in `collection`. The files' pictures are held in memory, compressed as they are, while
    they are decoded.

    Raises:
        UserError: pyarrow is not installed.
        DataError: not such a file, or no two classes.
    """
    files = parquet_files(path)
    parts = [_part(file) for file in files]
    if set(parts) != {None} and not {"train"} < set(parts) - {None} == set(parts):
        raise DataError(
            f"{shown(path)} has {', '.join(shown(file.name) for file in files)}; "
            "give train*.parquet and test*.parquet and no others, or one file"
        )
    _refuse_missing(path, files)
    name = shown(path.resolve().name)  # of a folder with a slash: no data set's name looks so
    collection = Collection(name=f"{name}/" if path.is_dir() else name, classes=[])
    contents: list[bytes] = []
    statuses = [file.stat() for file in files]
    budget = max(MAX_UNSUSPECTED, MAX_RATIO * sum(status.st_size for status in statuses))
    for file, part in zip(files, parts, strict=True):
        budget -= _collect(file, part, budget, collection, contents)
    if not contents:
        raise DataError(f"{shown(path)} has no rows with a picture and a label; give another file")
    settle(collection)
    key = [(str(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, statuses, strict=True)]
    size = choose_size(collection, contents, image_size)
    decoded = decode(path, json.dumps(key), contents, size, collection.summary())
    return collection, decoded


def _refuse_missing(path: Path, files: Sequence[Path]) -> None:
    """Refuse a part of a set whose files are numbered `-00000-of-00002`.

    Raises:
        DataError: a file is missing.
    """
    if not path.is_dir():
        return  # named alone, it is wanted alone
    there = {file.name for file in files}
    for file in files:
        if shard := SHARD.search(file.name):
            begin, end = file.name[: shard.start()], file.name[shard.end() :]
            digits, count = len(shard[1]), int(shard[2])
            named = (f"{begin}-{n:0{digits}}-of-{shard[2]}{end}" for n in range(min(count, MOST)))
            if missing := [name for name in named if name not in there]:
                raise DataError(
                    f"{shown(path)} lacks {shown(missing[0])}, one of {count:,} files: "
                    "bring it back, or name the one file that is to be read"
                )


def _part(file: Path) -> str | None:
    """The part that a file's name begins with, up to a point, a hyphen or a number."""
    return part_of(re.split(r"[-.\d]", file.name, maxsplit=1)[0])


def _collect(
    file: Path, part: str | None, budget: int, collection: Collection, contents: list[bytes]
) -> int:
    """Add a file's rows; returns what they take of the budget.

    A row without picture or label is a problem.
    """
    memory = (1 << 30) + 8 * file.stat().st_size
    try:
        names, pictures, labels, taken = limited(
            read_rows, file, budget, memory=memory, seconds=SECONDS
        )
    except LimitError as error:
        raise LimitError(f"{shown(file)}: {error}") from None
    for row, (content, label) in enumerate(zip(pictures, labels, strict=True)):
        where = f"{shown(file.name)} row {row}"
        name, reason = _label(label, names)
        if not content or name is None:
            missing = f"no picture (label {label!r:.80})" if name is not None else reason
            collection.note("rows that cannot be used", f"{where}: {missing}")
            continue
        contents.append(content)
        collection.pictures.append(Labelled(where, name, part))
    found = {picture.label for picture in collection.pictures}
    ordered = names or sorted(found, key=lambda n: (n.isdigit(), len(n) if n.isdigit() else 0, n))
    collection.classes = list(dict.fromkeys([*collection.classes, *ordered]))
    return taken


def read_rows(file: Path, budget: int) -> tuple[list[str], list[bytes | None], list[Any], int]:
    """Names of the classes, if the file has them; of each row the picture and the label; bytes.

    budget: bytes that all this may take.

    Raises:
        UserError: pyarrow is not installed.
        DataError: not such a file, or one that takes more than the budget.
    """
    table, column = _table(file, budget)
    names = _class_names(table.schema.metadata or {})
    labels = [_plain(value) for value in table.column("label").to_pylist()]
    pictures = []
    for picture in table.column(column).to_pylist():
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        pictures.append(content if isinstance(content, bytes) else None)
    return names, pictures, labels, _bytes(table)


def _bytes(table: Any) -> int:
    """What the rows take as objects."""
    size: int = table.nbytes + _ROW * table.num_rows
    return size


def _plain(value: Any) -> Any:
    """A label as text or a whole number, None for a gap; anything else as text to be refused.

    A column of numbers with gaps becomes one of floats in most programs: 3.0 is 3, NaN is a gap.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float) and abs(value) < 2**53 and value == int(value):
        value = int(value)
    if value is None or value in _GAPS or value != value:
        return None
    return value if isinstance(value, str | int) else _NoLabel(repr(value)[:80])


class _NoLabel(str):
    """What stands where a label should, as text."""


def _label(value: Any, names: list[str]) -> tuple[str | None, str]:
    """A class's name, or None and why: Hugging Face writes -1 where there is no label."""
    if isinstance(value, _NoLabel):
        return None, f"the label {value} is no whole number and no text"
    if value is None or value == -1:
        return None, f"no label ({value!r})"
    if isinstance(value, str):
        return value, ""
    if value < 0 or (names and value >= len(names)):
        return None, f"the label {value} is none of 0 to {len(names) - 1}" if names else (
            f"the label {value} is negative"
        )
    return (names[value] if names else str(value)), ""


def _table(file: Path, budget: int) -> tuple[Any, str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{shown(file)}: reading parquet needs pyarrow: {install('parquet')}"
        ) from None
    try:
        metadata = pyarrow.parquet.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
        column = next((name for name in PICTURE_COLUMNS if name in schema.names), None)
        if column is None or "label" not in schema.names:
            raise DataError(
                f"{shown(file)} has the columns {', '.join(schema.names)}; "
                "give img or image, and label"
            )
        _allow(file, _ROW * metadata.num_rows, budget)
        table = pyarrow.parquet.read_table(file, columns=[column, "label"])
        table = _without_references(table)
        _allow(file, _bytes(table), budget)
        return table, column
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{shown(file)}: not a readable parquet file ({reason})") from error


def _without_references(table: Any) -> Any:
    """The table with the values themselves where there are numbers that refer to them."""
    import pyarrow

    for i, field in enumerate(table.schema):
        if pyarrow.types.is_dictionary(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(field.type.value_type))
    return table


def _allow(file: Path, size: int, budget: int) -> None:
    if size > budget:
        raise DataError(
            f"{shown(file)}: its rows take {size >> 20:,} MiB, and of what all files here may take "
            f"{max(budget, 0) >> 20:,} MiB are left; give files of pictures, not of references"
        )


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """The names of a `ClassLabel`, if there are any."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return []
