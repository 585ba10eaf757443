"""A setting of a recipe: its name, kind, range and help, declared once on the field that holds it.

The command line's options, the settings of a study's arms, the commands that reports print and the
check of a file's values all come from these declarations.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from normlab.errors import UserError, nearest

KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a name",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of one setting.

    Attributes:
        name: as people write it, in options with `-` for `_`.
        kind: `int`, `float`, `bool` or `str`.
        optional: whether None is a value.
        help: one sentence for the command line.
        names: the values it may have, if they are names.
        allowed: whether a value is in its range.
        remedy: what to choose instead of a value that is not.
    """

    name: str
    kind: type
    optional: bool
    help: str
    names: tuple[str, ...]
    allowed: Callable[[Any], bool]
    remedy: str

    def check(self, value: object) -> None:
        """Raise `UserError` unless `value` is of the right kind and in range."""
        if value is None and self.optional:
            return
        wrong_kind = not isinstance(value, (int, float) if self.kind is float else self.kind)
        if wrong_kind or (isinstance(value, bool) and self.kind is not bool):
            wanted = KINDS[self.kind] + (" or none" if self.optional else "")
            raise UserError(f"{self.name}={value}: give {wanted}")
        if self.names and value not in self.names:
            raise UserError(f"unknown {self.name} {nearest(str(value), self.names)}")
        if not self.allowed(value):
            raise UserError(f"{self.name}={value}: {self.remedy}")

    def parse(self, text: str) -> Any:
        """Read a value that somebody typed.

        Raises:
            UserError: it is of another kind, or out of range.
        """
        value = self._read(text)
        self.check(value)
        return value

    def _read(self, text: str) -> Any:
        if self.optional and text == "none":
            return None
        if self.kind is bool:
            return {"true": True, "false": False}.get(text, text)
        try:
            return self.kind(text)
        except ValueError:
            return text


def setting(
    default: Any,
    help: str,
    *,
    name: str | None = None,
    names: tuple[str, ...] = (),
    allowed: Callable[[Any], bool] = lambda value: True,
    remedy: str = "",
) -> Any:
    """Declare a field of a dataclass to be a setting.

    Args:
        name: of the setting, if it differs from the field's.
    """
    metadata = {"help": help, "name": name, "names": names, "allowed": allowed, "remedy": remedy}
    return field(default=default, metadata=metadata)


def settings_of(part: type[Any]) -> dict[str, Setting]:
    """The settings that a dataclass declares, by the names of its fields."""
    if part not in _DECLARED:
        hints = get_type_hints(part)
        _DECLARED[part] = {
            f.name: _setting(f, hints[f.name]) for f in fields(part) if "help" in f.metadata
        }
    return _DECLARED[part]


_DECLARED: dict[type[Any], dict[str, Setting]] = {}


def option_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the options of a command.

    >>> option_words({"batch_size": 8, "flip": False, "patience": None})
    ['--batch-size', '8', '--no-flip', '--patience', 'none']
    """
    words = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", written(value)]
    return words


def written(value: object) -> str:
    """A setting's value as people write it, which `Setting.parse` reads.

    >>> written(0.5), written(None), written(True)
    ('0.5', 'none', 'true')
    """
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def check_settings(part: Any) -> None:
    """Raise `UserError` unless every setting of the dataclass instance is in its range."""
    for name, declared in settings_of(type(part)).items():
        declared.check(getattr(part, name))


def in_range(low: float, high: float, *, low_open: bool = False, high_open: bool = False) -> Any:
    """A check for finite numbers between two bounds."""

    def allowed(value: float) -> bool:
        above = value > low if low_open else value >= low
        below = value < high if high_open else value <= high
        return above and below and abs(value) != float("inf")

    return allowed


def _setting(f: Field[Any], hint: Any) -> Setting:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    metadata: Mapping[str, Any] = f.metadata
    return Setting(
        name=metadata["name"] or f.name,
        kind=next(k for k in kinds if k is not NoneType),
        optional=NoneType in kinds,
        help=metadata["help"],
        names=metadata["names"],
        allowed=metadata["allowed"],
        remedy=metadata["remedy"],
    )
