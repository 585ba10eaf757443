"""What an attack gives: how often it was tried, and how often nothing came of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """An attack and its outcome.

    Attributes:
        name: what was done, as docs/reliability.md says it.
        tried: how often.
        survived: of these, how often the promise held.
    """

    name: str
    tried: int
    survived: int
