"""A power law that was put in comes out; words follow from intervals; runs are not made twice."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import normlab
from normlab.__main__ import run as command
from normlab.api.curve import _part, learning_curve
from normlab.data import load
from normlab.data.batches import split_images
from normlab.errors import UserError
from normlab.study.learning_curve import LearningCurve, Point, extrapolate

pytestmark = pytest.mark.usefixtures("undrawn")

SIZES = (1000, 2000, 4000)


def drawn(a: float, b: float, noise: float, seeds: int = 3, total: int = 100_000) -> LearningCurve:
    rng = np.random.default_rng(0)
    points = [
        Point(n / 4000, n, seed, round(total * (1 - a * n**-b * (1 + noise * rng.normal()))), total)
        for seed in range(seeds)
        for n in SIZES
    ]
    return LearningCurve("r", "d", tuple(points))


def test_a_power_law_is_continued() -> None:
    curve = drawn(5.0, 0.4, 0.0)
    found = extrapolate(curve.points, 16_000)
    assert found.accuracy == pytest.approx(1 - 5 * 16_000**-0.4, abs=1e-4)
    assert found.high - found.low < 1e-4
    assert curve.answer().startswith("Yes, more pictures would help: twice as many (8,000)")


@pytest.mark.parametrize(
    ("b", "noise", "beginning"),
    [(0.4, 0.01, "Yes"), (0.0, 0.0, "Hardly"), (0.25, 0.2, "Perhaps")],
)
def test_words_follow_from_the_interval(b: float, noise: float, beginning: str) -> None:
    curve = drawn(1.0 if b == 0 else 3.0, b, noise) if b else drawn(0.2, 0.0, 0.0)
    assert curve.answer().startswith(beginning)


def test_two_trainings_tell_nothing() -> None:
    curve = LearningCurve("r", "d", (Point(50, 500, 0, 520, 1000), Point(100, 1000, 0, 500, 1000)))
    assert curve.answer().startswith("It cannot be said of two trainings")


def trained(
    error: Callable[[int], float], noise: float, rng: np.random.Generator, seeds: int = 3
) -> list[Point]:
    """A training of each seed at each of `SIZES`, its error shaken by a share `noise`."""
    return [
        Point(1, n, s, round(1e6 * (1 - error(n) * (1 + noise * rng.normal()))), 10**6)
        for s in range(seeds)
        for n in SIZES
    ]


def test_the_interval_holds_the_next_training() -> None:
    """Of 400 curves of three seeds, about 95 % hold what one more training gives."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        found = extrapolate(trained(lambda n: 4 * n**-0.3, 0.02, rng), 8000)
        held += found.low <= 1 - 4 * 8000**-0.3 <= found.high
    assert held >= 0.93 * 400


def test_a_floor_that_no_number_of_pictures_brings_below_is_allowed_for() -> None:
    """Where the fall slows down, a power law alone promises too much: here 2.5 points."""
    rng = np.random.default_rng(2)
    held, expected, true = 0, [], 1 - (40 * 8000**-0.8 + 0.15)
    for _ in range(200):
        found = extrapolate(trained(lambda n: 40 * n**-0.8 + 0.15, 0.01, rng), 8000)
        held += found.low <= true <= found.high
        expected.append(found.accuracy)
        assert found.low <= found.accuracy <= found.high
    assert held >= 0.93 * 200
    assert np.mean(expected) == pytest.approx(true, abs=0.01)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_estimate_lies_in_its_interval_and_one_seed_is_never_sure(seeds: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        points = trained(lambda n: 4 * n**-0.3, 0.05, rng, seeds)
        for sizes in (SIZES, SIZES[1:]):
            some = [p for p in points if p.pictures in sizes]
            found = extrapolate(some, 8000)
            assert found.low <= found.accuracy <= found.high
            # Two trainings leave no spread to tell; three do.
            assert (found.low < found.high) == (len(some) > 2)
        if seeds == 1:
            assert not LearningCurve("r", "d", tuple(points)).answer().startswith("Yes")


def test_two_sizes_tell_no_floor() -> None:
    """Any is possible, so the interval reaches from no gain to the power law's."""
    curve = drawn(5.0, 0.4, 0.005)
    two = [p for p in curve.points if p.pictures > 1000]
    found = extrapolate(two, 8000)
    assert found.accuracy == pytest.approx(1 - 5 * 8000**-0.4, abs=0.01)
    assert found.low < 1 - 4.9 * 4000**-0.4


def test_parts_are_of_every_class_and_nested() -> None:
    images = load("sample")
    parts = [_part(images, 0.1, share, 0) for share in (0.25, 0.5, 1.0)]
    assert [len(p.y_train) for p in parts[1:]] == [pytest.approx(180, abs=6), 360]
    for small, large in pairwise(parts):
        there = {x.tobytes() for x in large.x_train}
        assert all(x.tobytes() in there for x in small.x_train)
        share = np.bincount(small.y_train, minlength=10) / np.bincount(large.y_train, minlength=10)
        np.testing.assert_allclose(share, 0.5, atol=0.1)
    held = {x.tobytes() for x in split_images(images, 0.1)[1].images}
    for part in parts:
        assert part.x_val is not None
        assert {x.tobytes() for x in part.x_val} == held
        assert not held & {x.tobytes() for x in part.x_train}


def test_a_curve_from_the_terminal_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["curve", "fast79", "--data", "sample", "--batch-size", "100", "--shares", "50,100"]
    words += ["--seeds", "1", "--threads", "1", "--out", str(tmp_path / "c"), "--json"]
    assert command(words) == 0
    out, err = capsys.readouterr()
    assert "200 pictures, seed 0: test accuracy" in err
    told = json.loads(out.splitlines()[-1])
    assert [p["pictures"] for p in told["points"]] == [400, 200]
    assert told["answer"] + "." in out.splitlines()
    runs = [normlab.open_run(tmp_path / "c" / name) for name in ("100-seed0", "50-seed0")]
    assert [run.finished()["steps"] for run in runs] == [4, 4]
    assert (tmp_path / "c" / "curve.png").stat().st_size > 5_000
    before = (tmp_path / "c" / "50-seed0" / "result.json").stat().st_mtime_ns
    assert command(words) == 0
    assert (tmp_path / "c" / "50-seed0" / "result.json").stat().st_mtime_ns == before


def test_a_curve_is_not_the_latest_run(in_tmp: Path) -> None:
    words = ["--data", "sample", "--epochs", "1", "--batch-size", "200", "--threads", "1"]
    assert command(["train", "fast79", *words]) == 0
    assert command(["curve", "fast79", *words, "--shares", "50,100", "--seeds", "1"]) == 0
    assert (in_tmp / "runs" / "0002-curve" / "curve.json").exists()
    assert normlab.open_run().path == Path("runs/0001-fast79")


def test_runs_of_other_data_or_settings_are_not_taken_for_a_curve(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"shares": (0.5, 1.0), "seeds": 1, "threads": 1, "out": tmp_path / "c"}
    settings = {"epochs": 1, "batch_size": 200}
    sample = load("sample")
    found = learning_curve("fast79", data=sample, settings=settings, **quick)
    with pytest.raises(UserError, match="with other epochs: choose another folder"):
        learning_curve("fast79", data=sample, settings={**settings, "epochs": 2}, **quick)
    other = replace(sample, x_train=255 - np.asarray(sample.x_train))
    with pytest.raises(UserError, match="with other data: choose another folder"):
        learning_curve("fast79", data=other, settings=settings, **quick)
    (tmp_path / "c" / "50-seed0" / "result.json").unlink()  # as if it had been cut off
    assert learning_curve("fast79", data=sample, settings=settings, **quick) == found


def test_no_patience_ends_a_training_of_a_curve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="patience=3: all trainings of a curve take as many steps"):
        learning_curve("fast79", data="sample", settings={"patience": 3, "validation": 0.1})
    settings = {"epochs": 1, "batch_size": 200}
    images = replace(load("sample"), name="pets")  # data of one's own: the recipe `pictures`
    found = learning_curve(
        data=images, shares=(0.5, 1), seeds=1, threads=1, settings=settings, out=tmp_path / "c"
    )
    assert found.recipe == "pictures"
    runs = [normlab.open_run(point.run) for point in found.points]
    assert [run.task.recipe.patience for run in runs] == [None, None]
    assert len({run.finished()["steps"] for run in runs}) == 1


def test_parts_take_whole_groups() -> None:
    """Of each class one group at most is cut."""
    sample = load("sample")
    groups = np.arange(400) // 8
    images = replace(sample, groups_train=groups)
    part = _part(images, 0.0, 0.25, 0)
    number = {x.tobytes(): g for x, g in zip(sample.x_train, groups, strict=True)}
    taken = np.bincount([number[x.tobytes()] for x in part.x_train], minlength=50)
    assert np.count_nonzero(taken) < 30  # of all 50, were they taken one by one
    assert np.count_nonzero(taken == 8) > 5


@pytest.mark.parametrize("shares", [(1.0,), (0.5,), (0.5, 2.0), (0.0, 1.0)])
def test_shares_that_are_no_line_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="shares"):
        learning_curve("fast79", data="sample", shares=shares)
