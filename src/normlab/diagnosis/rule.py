"""A rule: a small function that looks for one fault, with what there is to say about it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from normlab.diagnosis.network import Network


@dataclass(frozen=True)
class Observation:
    """Where a fault shows, by what, and how bad it is there."""

    where: str
    severity: str
    evidence: str


Check = Callable[[Network], Iterator[Observation]]


@dataclass(frozen=True)
class Rule:
    """One line of docs/doctor.md.

    Attributes:
        id: what findings and tests call it.
        needs: keys of `network.FACTS` without which it cannot be checked.
        worst: the highest severity that it gives.
        title: what is wrong, in a few words: the first line of the check's docstring.
    """

    id: str
    needs: tuple[str, ...]
    worst: str
    remedy: str
    source: str
    title: str
    check: Check


def rule(*needs: str, worst: str, remedy: str, source: str) -> Callable[[Check], Rule]:
    """Make a `Rule` of a check; its id is the function's name with hyphens."""

    def make(check: Check) -> Rule:
        title = (check.__doc__ or "").strip().splitlines()[0].rstrip(".")
        name = check.__name__.replace("_", "-")
        return Rule(name, needs, worst, remedy, source, title, check)

    return make
