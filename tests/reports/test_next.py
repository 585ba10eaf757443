"""What a run ends with: what it lacks, by its own scores."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import normlab
from normlab.data.changes import Changes
from normlab.recipes import get
from normlab.reports.run_report import _lacks, warnings_of
from normlab.statistics import accuracy_interval


def run(accuracy: float, balanced: float, learnt: float, **changes: Any) -> Any:
    size = changes.pop("image_size", 64)
    start = changes.pop("start", None)
    recipe = changes.pop("recipe", "pictures")
    decided = changes.pop("decided", None)
    surest = changes.pop("surest", 0.6)
    result = {
        "test_accuracy": accuracy,
        "train_seconds": 100.0,
        "evaluation": {"balanced_accuracy": balanced, "surest_mistake": {"probability": surest}},
    }
    group_by = changes.pop("group_by", None)
    task = SimpleNamespace(
        recipe=get(recipe).override(**changes), data="pets", image_size=size, start=start,
        skip_bad=False, group_by=group_by, changes=decided,
    )  # fmt: skip
    return SimpleNamespace(
        task=task, path=Path("runs/1"), history=[{"accuracy": learnt}], finished=lambda: result
    )


SEED = "normlab train --data pets"
BUILTIN = SimpleNamespace(head="new", run="builtin")
FITTED = SimpleNamespace(head="fitted", run="net.pth")
CURVE = "normlab curve --data pets"
CHECK = "normlab data check pets"


@pytest.mark.parametrize(
    ("finished", "commands"),
    [
        (run(0.99, 0.99, 1.0), []),
        (run(0.99, 0.99, 1.0, surest=0.99), []),
        (run(0.99, 0.99, 1.0, recipe="notebook"), []),
        (run(0.99, 0.99, 1.0, recipe="pretrained", start=FITTED, surest=0.99), []),
        (run(0.85, 0.6, 0.9), [f"{SEED} --balance sampling", f"{SEED} --minutes 7"]),
        (run(0.85, 0.6, 0.9, balance="sampling"), [f"{SEED} --minutes 7", CURVE]),
        (run(0.7, 0.7, 0.95), [f"{SEED} --from builtin", f"{SEED} --minutes 7"]),
        (
            run(0.7, 0.7, 0.95, start=BUILTIN),
            [f"{SEED} --from resnet18.a1_in1k", f"{SEED} --minutes 7"],
        ),
        (run(0.7, 0.7, 0.95, start=SimpleNamespace(head="new", run="runs/1"), image_size=96), []),
        (run(0.6, 0.6, 0.6), [f"{SEED} --minutes 5"]),
        (run(0.6, 0.6, 0.6, surest=0.97), [f"{SEED} --minutes 5", CHECK]),
        (run(0.9, 0.9, 0.95, image_size=128), [CURVE]),
        (run(0.9, 0.9, 0.95, image_size=128, surest=0.97), [CHECK, CURVE]),
        (run(0.9, 0.9, 0.95, group_by="a", surest=0.97, image_size=96),
         [f"{CHECK} --group-by a", f"{CURVE} --group-by a"]),
        (run(0.9, 0.9, 0.95, image_size=128, surest=0.97, decided=Changes(exclude=("a",))), []),
        (run(0.9, 0.9, 0.95, recipe="pretrained", start=FITTED, surest=0.97),
         ["normlab train pretrained --from net.pth --epochs 3 --data pets", CHECK]),
    ],
)  # fmt: skip
def test_next_is_made_from_what_the_run_lacks(finished: Any, commands: list[str]) -> None:
    assert [" ".join(words) for words, _ in _lacks(finished)] == commands


def test_a_curve_says_how_long_it_will_take() -> None:
    ((_, reason),) = _lacks(run(0.9, 0.9, 0.95, image_size=128))
    assert "Nine trainings, about 15 minutes" in reason


def test_another_recipe_than_the_one_for_own_pictures_is_said() -> None:
    ((words, reason),) = _lacks(run(0.5, 0.5, 0.99, recipe="notebook"))
    assert words[:4] == ["normlab", "train", "--data", "pets"]
    assert "own pictures" in reason


def test_test_pictures_of_another_kind_are_warned_of(tmp_path: Path) -> None:
    """Red or blue; on the test pictures the colours of a third have changed places."""
    rng = np.random.default_rng(0)

    def pictures(count: int) -> tuple[Any, Any]:
        labels = np.arange(count) % 2
        x = rng.integers(0, 60, (count, 16, 16, 3), dtype=np.uint8)
        x[np.arange(count), :, :, 2 * labels] += 150
        return x, labels

    (x_train, y_train), (x_test, y_test) = pictures(300), pictures(90)
    x_test[:30] = x_test[:30, :, :, ::-1]
    data = tmp_path / "d.npz"
    np.savez(data, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    run = normlab.train(
        "fast79", data=data, out=tmp_path / "r", validation=0.2, epochs=8, threads=1
    )
    [told] = [line for line in warnings_of(run.finished()) if "are of another kind" in line]
    assert told.startswith(
        "100.0% of the held-out pictures are right and 66.7% of the test pictures"
    )


@pytest.mark.parametrize(
    ("right", "held_out", "accuracy", "images", "warned"),
    [
        (0.97, 60, 0.59, 100, True),
        (0.95, 2000, 0.86, 2000, False),  # sure, and below ten points
        (1.0, 10, 0.85, 20, False),  # may be chance
        (0.6, 600, 0.9, 600, False),
        (None, 0, 0.5, 100, False),
    ],
)
def test_far_more_right_is_ten_points_and_beyond_chance(
    right: float | None, held_out: int, accuracy: float, images: int, warned: bool
) -> None:
    result: Any = {
        "val_accuracy": right,
        "length": {"held_out": held_out},
        "test_accuracy": accuracy,
        "test_accuracy_interval": accuracy_interval(round(accuracy * images), images),
        "evaluation": {"class_accuracy": {}, "test_accuracy": accuracy},
    }
    assert bool(warnings_of(result)) == warned
