"""What a run ends with: what it lacks, by its own scores."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from normlab.recipes import get
from normlab.reports.run_report import _lacks


def run(accuracy: float, balanced: float, learnt: float, **changes: Any) -> Any:
    size = changes.pop("image_size", 64)
    start = changes.pop("start", None)
    recipe = changes.pop("recipe", "pictures")
    result = {
        "test_accuracy": accuracy,
        "train_seconds": 100.0,
        "evaluation": {"balanced_accuracy": balanced, "confusion": [[3, 1], [1, 5]]},
    }
    task = SimpleNamespace(
        recipe=get(recipe).override(**changes), data="pets", image_size=size, start=start,
        skip_bad=False, group_by=None, changes=None,
    )  # fmt: skip
    return SimpleNamespace(
        task=task, path=Path("runs/1"), history=[{"accuracy": learnt}], finished=lambda: result
    )


@pytest.mark.parametrize(
    ("finished", "options"),
    [
        (run(0.99, 0.99, 1.0), []),
        (run(0.85, 0.6, 0.9), [["--balance", "sampling"], ["--minutes", "7"]]),
        (run(0.85, 0.6, 0.9, balance="sampling"), [["--minutes", "7"]]),
        (run(0.7, 0.7, 0.95), [["--from", "builtin"], ["--minutes", "7"]]),
        (
            run(0.7, 0.7, 0.95, start=SimpleNamespace(head="new", run="builtin")),
            [["--minutes", "7"]],
        ),
        (run(0.6, 0.6, 0.6), [["--minutes", "5"]]),
        (run(0.9, 0.9, 0.95, image_size=128), []),
    ],
)
def test_next_is_made_from_what_the_run_lacks(finished: Any, options: list[list[str]]) -> None:
    commands = [words for words, _ in _lacks(finished)]
    assert [words[:4] for words in commands] == [["normlab", "train", "--data", "pets"]] * len(
        options
    )
    assert [words[4:] for words in commands] == options


def test_another_recipe_than_the_one_for_own_pictures_is_said() -> None:
    ((words, reason),) = _lacks(run(0.5, 0.5, 0.99, recipe="notebook"))
    assert words[:4] == ["normlab", "train", "--data", "pets"]
    assert "own pictures" in reason
