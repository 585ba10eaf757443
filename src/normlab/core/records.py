"""Files of JSON that were written here, read back at the border: whole and of the right kinds."""

import json
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import msgspec

from normlab.core.places import read_text
from normlab.errors import DataError

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: it is missing, not JSON, or not an object.
    """
    try:
        return as_object(json.loads(read_text(path)), path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: name the folder of a run") from None
    except DataError:
        raise
    except (ValueError, OSError, RecursionError) as e:
        raise DataError(f"{path} cannot be read as JSON ({e})") from None


def as_object(value: Any, where: object) -> dict[str, Any]:
    """`value` itself, if it is a JSON object.

    Raises:
        DataError: it is something else; `where` begins the message.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} holds no JSON object: it is not one that normlab wrote")
    return value


def typed(values: Any, kind: type[T], where: object, **built: Any) -> T:
    """Build a dataclass from JSON, every value of the kind that its field declares.

    Keys that the dataclass does not have are passed over: a later release may have written them.

    Args:
        where: begins the message.
        **built: fields that are built already.

    Raises:
        DataError: a key is missing, or a value is of another kind.
    """
    shape = _shape(cast(Any, kind), frozenset(built))
    try:
        found = msgspec.convert(values, shape)
    except (msgspec.ValidationError, RecursionError, UnicodeError) as e:
        raise DataError(f"{where} is not as normlab wrote it ({e})") from None
    return kind(**{name: getattr(found, name) for name in shape.__struct_fields__}, **built)


def checked(values: dict[str, Any], kind: Any, where: object) -> Any:
    """`values` itself, with all its keys, if those that the `TypedDict` declares are sound.

    Raises:
        DataError: as `typed`.
    """
    try:
        msgspec.convert(values, kind)
    except (msgspec.ValidationError, RecursionError, UnicodeError) as e:
        raise DataError(f"{where} is not as normlab wrote it ({e})") from None
    return values


@cache
def _shape(kind: Any, built: frozenset[str]) -> type[msgspec.Struct]:
    """The fields of a dataclass that are read from a file, as msgspec checks them."""
    hints = get_type_hints(kind, include_extras=True)
    rows: list[Any] = []
    for field in fields(kind):
        if field.name in built:
            continue
        row: tuple[Any, ...] = (field.name, hints[field.name])
        if field.default_factory is not MISSING:
            row = (*row, msgspec.field(default_factory=field.default_factory))
        elif field.default is not MISSING:
            row = (*row, field.default)
        rows.append(row)
    return msgspec.defstruct(kind.__name__, rows, kw_only=True)
