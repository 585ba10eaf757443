"""Arms: what is compared. An arm is a name and what it changes in the study's recipe."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch

from normlab.errors import UserError
from normlab.layers import NORMS
from normlab.recipes import Recipe
from normlab.runs.run import Task

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+×-]*")  # a part of a file's name, too
SEED_OFFSET = "seed_offset"


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: in reports and file names.
        changes: fields of `Recipe` and their values.
        seed_offset: added to the seed of every pair. Other than 0 it takes away all that the arm
            would share with the others, as when a recipe is compared with itself.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    seed_offset: int = 0

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):  # it is a part of files' names: ../ would lead elsewhere
            raise UserError(
                f"arm {self.name!r}: name it with letters, digits and . _ + - ×, no spaces"
            )

    def recipe(self, base: Recipe) -> Recipe:
        """The study's recipe with this arm's changes.

        Raises:
            UserError: a field that recipes do not have, or a value out of its range.
        """
        known = _known_keys()
        for key in self.changes:
            if key not in known:
                raise UserError(
                    f"arm {self.name!r}: unknown setting {key!r}: choose from {', '.join(known)}"
                )
        try:
            return replace(base, **self.changes)
        except UserError as e:
            raise UserError(f"arm {self.name!r}: {e}") from None

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "changes": self.changes, SEED_OFFSET: self.seed_offset}


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
                f"unknown norm {name!r}: choose from {', '.join(NORMS)}, "
                "or describe an arm as 'NAME: key=value, …'"
            )
        return Arm(name, {"norm": name})
    changes: dict[str, Any] = {}
    for item in filter(None, map(str.strip, rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise UserError(f"arm {name!r}: {item!r} is not key=value")
        changes[key] = parse_value(key, value, f"arm {name!r}")
    return Arm(name, changes, seed_offset=changes.pop(SEED_OFFSET, 0))


def parse_value(key: str, text: str, where: str) -> Any:
    """Read `text` as the type that the recipe's field `key` has.

    Raises:
        UserError: an unknown key, or a text that is no such value; `where` begins the message.
    """
    hints = get_type_hints(Recipe) | {SEED_OFFSET: int}
    known = [*_known_keys(), SEED_OFFSET]
    if key not in known:
        raise UserError(f"{where}: unknown setting {key!r}: choose from {', '.join(known)}")
    kinds = get_args(hints[key]) if isinstance(hints[key], UnionType) else (hints[key],)
    if type(None) in kinds and text == "none":
        return None
    for kind in kinds:
        try:
            if kind is bool and text in ("true", "false"):
                return text == "true"
            if kind in (int, float, str):
                return kind(text)
        except ValueError:
            continue
    wanted = " or ".join("none" if k is type(None) else getattr(k, "__name__", k) for k in kinds)
    raise UserError(f"{where}: {key}={text}: give a value of type {wanted}")


def check_arm(arm: Arm, base: Recipe, class_names: tuple[str, ...], image_size: int) -> None:
    """Build the arm's network and ask it for one answer, so that what it cannot do is known now.

    Raises:
        UserError: such as `instance` on a layer whose input is a vector.
    """
    task = Task(
        recipe=arm.recipe(base),
        seed=0,
        data="",
        data_sha256="",
        class_names=class_names,
        image_size=image_size,
    )
    try:
        with torch.no_grad():
            task.build().eval()(torch.zeros(1, 3, image_size, image_size))
    except UserError as e:
        raise UserError(f"arm {arm.name!r}: {e}") from None


def _known_keys() -> list[str]:
    return [f.name for f in fields(Recipe) if f.name != "name"]
