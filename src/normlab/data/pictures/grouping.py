"""Pictures that belong together, of one person or one shot, by a pattern of their names.

A split that has pictures of one person on both sides scores how well persons are recognised. So a
group is in one part of every split.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from normlab.core.streams import stream
from normlab.errors import DataError
from normlab.text import counted

LONGEST = 200  # letters of a pattern


def groups_of(names: Sequence[str], pattern: str, notes: list[str]) -> list[int]:
    """The number of each picture's group.

    A group are the pictures whose names have the same text where the pattern, a regular expression,
    is found first: what brackets enclose, or all of it. A picture in whose name it
    is not found is a group of its own. What was found is added to `notes`.

    Raises:
        DataError: it is no regular expression, or is found in no name.
    """
    if len(pattern) > LONGEST:
        raise DataError(f"--group-by has {len(pattern):,} letters; give at most {LONGEST}")
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(
            f"--group-by {pattern!r} is no regular expression ({error}); for the letters before "
            "the first _ of a file's name give '([^/_]+)_[^/]*$'"
        ) from None
    found = [compiled.search(name) for name in names]
    if not any(found):
        example = f", such as {names[0]}" if names else ""
        raise DataError(
            f"--group-by {pattern!r} is found in none of the {len(names):,} names{example}; "
            "give a regular expression that is"
        )
    keys = [
        ("", name) if match is None else match.groups() or (match[0],)
        for name, match in zip(names, found, strict=True)
    ]
    number = {key: k for k, key in enumerate(dict.fromkeys(keys))}
    alone = sum(match is None for match in found)
    rest = f"; {counted(alone, 'picture')} without the pattern, each a group of its own"
    notes.append(
        f"{len(names) - alone:,} pictures in {counted(len(number) - alone, 'group')} by "
        f"{pattern!r}{rest if alone else ''}"
    )
    return [number[key] for key in keys]


def deal(
    undecided: Mapping[str, Sequence[int]], groups: Sequence[int], share: float
) -> dict[int, str]:
    """Parts for pictures by their classes: about `share` of each class for testing.

    Groups are taken in an order drawn once. One goes to the test pictures if that brings the
    classes' numbers nearer to the share; a class's last group stays for training. A class of which
    none went there gives the smallest that may go.
    """
    label = {i: name for name, indices in undecided.items() for i in indices}
    members: dict[int, list[int]] = defaultdict(list)
    for i in sorted(label):
        members[groups[i]].append(i)
    missing = {name: share * len(indices) for name, indices in undecided.items()}
    left = {name: len({groups[i] for i in indices}) for name, indices in undecided.items()}
    counts = {group: Counter(label[i] for i in own) for group, own in members.items()}
    parts = dict.fromkeys(label, "train")
    tested: set[str] = set()

    def test(group: int) -> None:
        parts.update(dict.fromkeys(members[group], "test"))
        for name, n in counts[group].items():
            missing[name] -= n
            left[name] -= 1
            tested.add(name)

    drawn = stream(0, "pictures", "groups").permutation(sorted(members))
    for group in drawn.tolist():
        gain = sum(missing[c] ** 2 - (missing[c] - n) ** 2 for c, n in counts[group].items())
        if gain > 0 and all(left[c] > 1 for c in counts[group]):
            test(group)
    for group in sorted(drawn.tolist(), key=lambda g: len(members[g])):
        if counts[group].keys() - tested and all(left[c] > 1 for c in counts[group]):
            test(group)
    return parts


def group_order(labels: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """An order (N,) with each group in one piece and the classes about in proportion in stretches.

    A group's place is the mean of its pictures' places, which for each class are spread evenly over
    its groups in an order drawn once.
    """
    place = np.empty(len(labels))
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        different, which = np.unique(groups[own], return_inverse=True)
        rank = stream(0, "pictures", "group order", int(label)).permutation(len(different))
        place[own[np.argsort(rank[which], kind="stable")]] = (np.arange(len(own)) + 0.5) / len(own)
    _, which = np.unique(groups, return_inverse=True)
    mean = np.bincount(which, place) / np.bincount(which)
    return np.lexsort((np.arange(len(labels)), which, mean[which]))
