"""Arms: what is compared. An arm is a name and what it changes in the study's recipe."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from normlab.errors import UserError, nearest
from normlab.recipes import SETTINGS, Recipe
from normlab.recipes.families import NORMS
from normlab.recipes.settings import Setting

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+×-]*")  # a part of a file's name, too
SEED_OFFSET = "seed_offset"
IMAGE_SIZE, START = "image_size", "from"  # of an arm, though no settings of a recipe


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: in reports and file names.
        changes: settings of a recipe and their values.
        seed_offset: added to the seed of every pair. Other than 0 it takes away all that the arm
            would share with the others, as when a recipe is compared with itself.
        image_size: of its pictures; None for the study's.
        start: the run it starts from; None for the seed.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    seed_offset: int = 0
    image_size: int | None = None
    start: str | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):  # it is a part of files' names: ../ would lead elsewhere
            raise UserError(
                f"arm {self.name!r}: name it with letters, digits and . _ + - ×, no spaces"
            )

    def recipe(self, base: Recipe) -> Recipe:
        """The study's recipe with this arm's changes.

        Raises:
            UserError: a setting that the recipe does not have, or a value out of its range.
        """
        try:
            return base.with_settings(self.changes)
        except UserError as e:
            raise UserError(f"arm {self.name!r}: {e}") from None

    def as_dict(self) -> dict[str, Any]:
        more = {IMAGE_SIZE: self.image_size, "start": self.start}
        return {
            "name": self.name,
            "changes": self.changes,
            SEED_OFFSET: self.seed_offset,
            **{key: value for key, value in more.items() if value is not None},
        }


def make_arms(arms: Sequence[str | Arm]) -> tuple[Arm, ...]:
    """Read arms: an `Arm`, a normaliser's name, or `NAME: key=value, …`.

    Raises:
        UserError: fewer than two, two of one name, or one that cannot be read.
    """
    made = tuple(a if isinstance(a, Arm) else parse_arm(a) for a in arms)
    names = [arm.name for arm in made]
    if len(made) < 2:
        raise UserError(f"arms={', '.join(names) or 'none'}: a comparison needs two or more")
    for i, name in enumerate(names):
        if name.casefold() in map(str.casefold, names[:i]):
            raise UserError(f"two arms are called {name!r}: give each a name of its own")
    return made


def parse_arm(text: str) -> Arm:
    """Read `batch` (a normaliser) or `NAME: key=value, …`.

    >>> parse_arm("big: batch_size=256, learning_rate=8e-3")
    Arm(name='big', changes={'batch_size': 256, 'learning_rate': 0.008}, seed_offset=0)

    Raises:
        UserError: an unknown normaliser or key, or a value of another type than the key's.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if not colon:
        if name not in NORMS:
            raise UserError(
                f"unknown norm {nearest(name, NORMS)}, or describe an arm as 'NAME: key=value, …'"
            )
        return Arm(name, {"norm": name})
    changes: dict[str, Any] = {}
    for item in filter(None, map(str.strip, rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise UserError(f"arm {name!r}: {item!r} is not key=value")
        changes[key] = parse_value(key, value, f"arm {name!r}")
    return Arm(
        name,
        changes,
        seed_offset=changes.pop(SEED_OFFSET, 0),
        image_size=changes.pop(IMAGE_SIZE, None),
        start=changes.pop(START, None),
    )


def parse_value(key: str, text: str, where: str) -> Any:
    """Read `text` as a value of the setting `key`.

    Raises:
        UserError: an unknown setting, or a text that is no such value; `where` begins the message.
    """
    known = {**SETTINGS, **_OTHERS}
    if key not in known:
        raise UserError(f"{where}: unknown setting {nearest(key, known)}")
    try:
        return known[key].parse(text)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _other(
    name: str, kind: type, low: float = float("-inf"), high: float = float("inf")
) -> Setting:
    return Setting(
        name=name,
        kind=kind,
        optional=False,
        help="",
        names=(),
        allowed=lambda value: kind is str or low <= value <= high,
        remedy=f"choose {low:g} to {high:g}",
    )


_OTHERS = {
    s.name: s
    for s in (_other(SEED_OFFSET, int), _other(IMAGE_SIZE, int, 8, 512), _other(START, str))
}
