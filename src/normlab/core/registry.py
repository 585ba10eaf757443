"""Families whose members are loaded when they are first used, so that their names cost nothing."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar, cast

from normlab.errors import UserError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Members by name, in the order in which they were given.

    Args:
        kind: what a member is, for messages.
        places: where each member is defined, as `package.module:attribute`.
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)

    def __getitem__(self, name: str) -> T:
        """Load a member.

        Raises:
            UserError: an unknown name.
        """
        if name not in self._places:
            raise UserError(f"unknown {self.kind} {nearest(name, self)}")
        module, _, attribute = self._places[name].partition(":")
        return cast(T, getattr(import_module(module), attribute))

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
