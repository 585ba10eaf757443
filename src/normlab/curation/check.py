"""Look at a data set before it is trained on: copies, doubtful labels, odd pictures, classes."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from normlab import recipes
from normlab.core.environment import settings
from normlab.curation.copies import SURE, Copies, find_copies
from normlab.curation.descriptors import SIDE, describe, to_side
from normlab.curation.labels import (
    Suspects,
    by_regression,
    by_training,
    doubt,
    folds_of,
    for_few,
    together,
)
from normlab.curation.oddities import Oddity, class_notes, file_sizes, find_oddities
from normlab.curation.pictures import Pictures
from normlab.evaluation.features import features as features_of
from normlab.training.pretrained import Pretrained

MANY = 20_000  # pictures from which on networks alone judge the labels
REGRESSIONS, TRAININGS = 5, 3  # folds: each model sees the pictures of the others
Say = Callable[[str], None]


@dataclass(frozen=True)
class Group:
    """Pictures that show the same, the most certain first.

    members: indices, test pictures last.
    exact: whether all are equal to the pixel.
    leaks: whether they are in more than one part.
    contradicts: whether they have more than one label.
    score: of its surest pair.
    """

    members: tuple[int, ...]
    exact: bool
    leaks: bool
    contradicts: bool
    score: float


@dataclass(frozen=True, eq=False)
class Check:
    """What was found; indices are those of `pictures`."""

    pictures: Pictures
    copies: Copies
    groups: list[Group]
    suspects: Suspects | None
    oddities: list[Oddity]
    classes: list[str]
    by: str
    seconds: dict[str, float]

    @property
    def leaked(self) -> list[int]:
        """Test pictures of which there is a copy in another part."""
        parts = self.pictures.parts
        leaked = {i for one in self.groups if one.leaks for i in one.members if parts[i] == "test"}
        return sorted(leaked)


def check(
    pictures: Pictures,
    *,
    threads: int,
    body: Pretrained | None = None,
    say: Say = lambda _: None,
) -> Check:
    """Look for copies, doubtful labels and odd pictures.

    body: a pretrained network, by whose features labels are judged.
    say: told what is being done, a line for each part.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def done(part: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[part], started = now - started, now

    with settings(threads, torch.device("cpu")):
        n = len(pictures)
        say(f"describing {n:,} pictures")
        small = to_side(pictures.pixels)
        features = describe(small)
        done("descriptions")
        say("looking for copies")
        copies = find_copies(small, pictures.prints, features)
        groups = group(pictures, copies)
        done("copies")
        say("asking models that have not seen a picture what it shows, a minute or two")
        suspects, by = _doubts(pictures, features, groups, body)
        done("labels")
        say("looking for odd pictures")
        oddities = find_oddities(pictures, features, file_sizes(pictures.files))
        done("odd pictures")
    return Check(pictures, copies, groups, suspects, oddities, class_notes(pictures), by, seconds)


def group(pictures: Pictures, copies: Copies) -> list[Group]:
    """Sure pairs that share a picture are joined; a less sure pair stands alone, lest it bridge two
    groups. Those across parts or labels come first, then by certainty.
    """
    parent = np.arange(len(pictures))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    pairs = list(zip(copies.pairs.tolist(), copies.scores.tolist(), strict=True))
    for (a, b), score in pairs:
        if score >= SURE:
            one, other = root(a), root(b)
            parent[max(one, other)] = min(one, other)
    members: dict[int, set[int]] = defaultdict(set)
    best: dict[int, float] = {}
    alone: list[tuple[tuple[int, ...], float]] = []
    for (a, b), score in pairs:
        first = root(a)
        if score >= SURE:
            members[first] |= {a, b}
            best[first] = max(score, best.get(first, score))
        elif first != root(b):
            alone.append(((a, b), score))
    found = [(tuple(own), best[first]) for first, own in members.items()] + alone
    groups = [_group(pictures, own, score) for own, score in found]
    return sorted(groups, key=lambda g: (not (g.leaks or g.contradicts), -g.score, g.members))


def _group(pictures: Pictures, members: tuple[int, ...], score: float) -> Group:
    order = {"train": 0, "val": 1, "test": 2}
    return Group(
        members=tuple(sorted(members, key=lambda i: (order[pictures.parts[i]], i))),
        exact=len({pictures.prints[i] for i in members}) == 1,
        leaks=len({pictures.parts[i] for i in members}) > 1,
        contradicts=len({int(pictures.labels[i]) for i in members}) > 1,
        score=score,
    )


def _doubts(
    pictures: Pictures, features: NDArray[np.float32], groups: list[Group], body: Pretrained | None
) -> tuple[Suspects | None, str]:
    """Doubtful labels, and in words by what they were found."""
    labels, k = pictures.labels, len(pictures.class_names)
    same = np.arange(len(labels))
    for one in groups:  # copies of a picture would tell its label
        linked = same[list(one.members)]
        same[np.isin(same, linked)] = linked[0]
    same = pictures.joined(same)
    if k < 2 or np.bincount(labels, minlength=k).max() < 2 or len(np.unique(same)) < 20:
        return None, "too few pictures"
    pixels, trainings = pictures.pixels, f"{TRAININGS} short trainings"
    if body is None and len(labels) >= MANY:
        p = by_training(pixels, labels, k, folds_of(labels, same, TRAININGS), recipes.get("fast79"))
        return doubt(labels, p), f"{trainings}, each on the other folds"
    fold = folds_of(labels, same, REGRESSIONS)
    mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
    if body is not None:
        model = body.model()
        features = (features_of(model, pixels) + features_of(model, mirrored)) / np.float32(2)
        p = by_regression(features, labels, k, fold)
        by = f"{REGRESSIONS} logistic regressions on the features of {body.origin.network}"
        return doubt(labels, p), by
    if pixels.shape[1] != SIDE:
        features = describe(pixels)
    features = (features + describe(mirrored)) / np.float32(2)
    p = by_regression(features, labels, k, fold)
    recipe = for_few(len(labels), pictures.class_names, pixels.shape[1])
    q = by_training(pixels, labels, k, folds_of(labels, same, TRAININGS), recipe)
    by = f"{REGRESSIONS} logistic regressions on the built-in body's answers and {trainings}"
    return doubt(labels, together(p, q)), by


def as_record(found: Check) -> dict[str, Any]:
    """What JSON keeps: every list by the names of pictures."""
    pictures, suspects = found.pictures, found.suspects
    names, classes = pictures.names, pictures.class_names
    parts = np.array(pictures.parts)
    doubted = [] if suspects is None else suspects.order[: suspects.count].tolist()
    return {
        "data": pictures.name,
        "pictures": len(pictures),
        "parts": {part: int((parts == part).sum()) for part in dict.fromkeys(pictures.parts)},
        "classes": list(classes),
        "copies": {
            "groups": [
                {
                    "pictures": [names[i] for i in one.members],
                    "labels": [classes[pictures.labels[i]] for i in one.members],
                    "exact": one.exact,
                    "across_parts": one.leaks,
                    "labels_differ": one.contradicts,
                    "score": None if np.isinf(one.score) else round(one.score, 3),
                }
                for one in found.groups
            ],
            "test_pictures_with_a_copy_in_another_part": [names[i] for i in found.leaked],
            "planted_copies_found": found.copies.found,
        },
        "labels": suspects
        and {
            "by": found.by,
            "accuracy_on_unseen": suspects.accuracy,
            "estimated_wrong": suspects.estimate,
            "suspects": [
                {
                    "picture": names[i],
                    "label": classes[pictures.labels[i]],
                    "suggested": classes[suspects.suggested[i]],
                    "probability": round(float(suspects.own[i]), 4),
                }
                for i in doubted
            ],
        },
        "odd": [{"picture": names[o.index], "kind": o.kind, "why": o.why} for o in found.oddities],
        "class_notes": found.classes,
        "passed_over": [{"file": name, "why": why} for name, why in pictures.passed],
        "seconds": {part: round(value, 1) for part, value in found.seconds.items()},
    }
