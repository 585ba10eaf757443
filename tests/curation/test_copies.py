"""Copies that were planted are found, and pictures that are none are not."""

import hashlib

import numpy as np
import pytest

from normlab.curation.check import group
from normlab.curation.copies import Copies, find_copies
from normlab.curation.descriptors import describe, to_side
from normlab.curation.pictures import Pictures, from_images
from normlab.curation.planting import CHANGES
from normlab.data import load


def prints(pixels: np.ndarray) -> list[bytes]:
    return [hashlib.sha256(picture.tobytes()).digest() for picture in pixels]


@pytest.fixture(scope="module")
def searched() -> tuple[np.ndarray, list[tuple[str, int, int]], Copies]:
    """The sample, ten changed copies of each kind and three exact ones; what was planted; found."""
    sample = load("sample")
    originals = np.concatenate([sample.x_train, sample.x_test])
    rng = np.random.default_rng(5)
    extra, planted = [], []
    for kind, change in CHANGES.items():
        for i in rng.choice(len(originals), 10, replace=False).tolist():
            planted.append((kind, i, len(originals) + len(extra)))
            extra.append(change(originals[i], rng))
    for i in (3, 4, 5):
        planted.append(("exact", i, len(originals) + len(extra)))
        extra.append(originals[i])
    pixels = np.concatenate([originals, np.stack(extra)])
    return pixels, planted, find_copies(pixels, prints(pixels), describe(pixels))


def test_planted_copies_are_found(
    searched: tuple[np.ndarray, list[tuple[str, int, int]], Copies],
) -> None:
    _, planted, copies = searched
    found = set(map(tuple, copies.pairs.tolist()))
    missed = [kind for kind, a, b in planted if (a, b) not in found]
    assert missed.count("exact") == 0
    assert missed.count("several") <= 4
    assert max(missed.count(kind) for kind in CHANGES if kind != "several") <= 1


def test_other_pictures_are_not(
    searched: tuple[np.ndarray, list[tuple[str, int, int]], Copies],
) -> None:
    """Pairs of which neither was planted: at most two among 600 pictures look alike to it."""
    pixels, planted, copies = searched
    originals = {a: a for a in range(600)} | {b: a for _, a, b in planted}
    wrong = [(a, b) for a, b in copies.pairs.tolist() if originals[a] != originals[b]]
    assert len(pixels) == 683
    assert len(wrong) <= 3


def test_exact_copies_score_highest_and_pairs_are_sorted(
    searched: tuple[np.ndarray, list[tuple[str, int, int]], Copies],
) -> None:
    _, _, copies = searched
    assert np.isinf(copies.scores[:3]).all()
    assert (np.diff(copies.scores[3:]) <= 0).all()
    assert (copies.pairs[:, 0] < copies.pairs[:, 1]).all()
    assert set(copies.found) == set(CHANGES)
    assert min(v for k, v in copies.found.items() if k != "several") > 0.9


def test_many_exact_copies_are_one_group() -> None:
    """More of one picture than there are neighbours looked at."""
    sample = load("sample")
    pixels = np.concatenate([sample.x_train[:30], sample.x_train[:1].repeat(25, 0)])
    copies = find_copies(pixels, prints(pixels), describe(pixels))
    groups = group(pictures(pixels, [0] * 55, ["train"] * 54 + ["test"]), copies)
    assert groups[0].members == (0, *range(30, 55))
    assert groups[0].exact
    assert groups[0].leaks
    assert not groups[0].contradicts


def pictures(pixels: np.ndarray, labels: list[int], parts: list[str]) -> Pictures:
    return Pictures(
        name="some",
        class_names=("a", "b"),
        pixels=pixels,
        labels=np.array(labels),
        names=[f"{i}.png" for i in range(len(pixels))],
        parts=parts,
        prints=prints(pixels),
        files=[None] * len(pixels),
    )


def test_an_unsure_pair_does_not_bridge_groups() -> None:
    pixels = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
    pixels = pixels.repeat(3, 3)
    copies = Copies(
        pairs=np.array([[0, 1], [2, 3], [1, 2], [0, 1], [4, 5]]),
        scores=np.array([5.0, 4.0, 1.0, 0.5, 0.3]),
        compared=5,
        found={},
    )
    parts = ["train"] * 5 + ["test"]
    groups = group(pictures(pixels, [0, 0, 0, 1, 1, 1], parts), copies)
    assert [g.members for g in groups] == [(2, 3), (4, 5), (0, 1), (1, 2)]
    assert groups[0].contradicts
    assert groups[1].leaks


@pytest.mark.parametrize("size", [16, 32, 50, 64])
def test_any_size_is_brought_to_one(size: int) -> None:
    flat = np.full((2, size, size, 3), (10, 100, 200), np.uint8)
    small = to_side(flat)
    assert small.shape == (2, 32, 32, 3)
    assert (small == (10, 100, 200)).all()


def test_changes_change_and_keep_the_size() -> None:
    picture = load("sample").x_train[0]
    rng = np.random.default_rng(0)
    for kind, change in CHANGES.items():
        for size in (32, 33):
            source = picture if size == 32 else np.pad(picture, ((0, 1), (0, 1), (0, 0)))
            changed = change(source, rng)
            assert changed.shape == source.shape, kind
            assert changed.dtype == np.uint8, kind
            assert (changed != source).any(), kind


def test_grey_and_blank_pictures_do_not_stop_it() -> None:
    pixels = np.full((40, 32, 32, 3), 128, np.uint8)
    pixels += np.arange(40, dtype=np.uint8)[:, None, None, None]
    copies = find_copies(pixels, prints(pixels), describe(pixels))
    assert np.isfinite(copies.scores).all()
    assert from_images(load("sample")).parts.count("test") == 200
