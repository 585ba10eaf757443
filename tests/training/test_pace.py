"""How long a training takes: planned, told, and kept to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normlab
from normlab import UserError
from normlab.api import train as training
from normlab.evaluation.scores import score
from normlab.recipes import get
from normlab.runs import Task
from normlab.training import pace as pacing
from normlab.training.hooks import Deadline, make_hooks
from normlab.training.loop import fit
from normlab.training.pace import Pace, largest_in, measure, steps_in
from normlab.training.preparation import make_plan, new_state
from normlab.training.state import State, StepResult

PACE = Pace(step=0.1, half_step=0.03, image=0.001)


@pytest.fixture(scope="module")
def images() -> normlab.ImageData:
    return normlab.load("sample")


def noise() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (60, 32, 32, 3), np.uint8), "y_train": np.arange(60) % 3,
        "x_test": rng.integers(0, 256, (9, 32, 32, 3), np.uint8), "y_test": np.arange(9) % 3,
    }  # fmt: skip


def task(images: normlab.ImageData, recipe: str = "pictures", **changes: Any) -> Task:
    return Task(
        recipe=get(recipe).override(**changes), seed=0, data="sample", image_size=32,
        data_sha256=images.sha256, class_names=images.class_names,
    )  # fmt: skip


def test_seconds_are_those_of_steps_and_validations(images: normlab.ImageData) -> None:
    plan = make_plan(task(images, batch_size=36, epochs=5), images, 1)  # 360 + 40 images
    assert plan.steps == 50
    assert PACE.seconds(plan) == pytest.approx(50 * (0.4 * 0.03 + 0.6 * 0.1) + 5 * 40 * 0.001)


@pytest.mark.parametrize("seconds", [8.0, 30.0, 100.0, 1000.0])
def test_steps_fill_the_time(images: normlab.ImageData, seconds: float) -> None:
    asked = task(images)
    steps = steps_in(seconds, PACE, asked, images)
    recipe = asked.recipe.with_settings({"epochs": 1, "least_steps": steps})
    plan = make_plan(replace(asked, recipe=recipe), images, 1)
    taken = PACE.seconds(plan) + PACE.ending(plan, images)
    assert 0.8 * seconds - 2 <= taken <= 1.02 * seconds


def test_too_little_time_for_a_look_at_each_image_is_said(images: normlab.ImageData) -> None:
    with pytest.raises(UserError, match=r"one look at each of 360 images.*longer.*--minutes"):
        steps_in(1.0, PACE, task(images), images)


@pytest.mark.parametrize(("seconds", "size"), [(10, 32), (300, 64), (10_000, 128)])
def test_more_time_makes_larger_pictures(
    images: normlab.ImageData, monkeypatch: pytest.MonkeyPatch, seconds: float, size: int
) -> None:
    def measured(asked: Task, device: torch.device) -> Pace:
        step = 0.05 * (asked.image_size / 32) ** 2
        return Pace(step, step / 4, step / 200)

    monkeypatch.setattr(pacing, "measure", measured)

    def at(side: int) -> Task:
        return replace(task(images), image_size=side)

    found, pace = largest_in(seconds, (32, 64, 128), at, images, torch.device("cpu"))
    assert found == size
    assert pace.step == 0.05 * (size / 32) ** 2


def test_a_pace_is_measured_without_a_trace(images: normlab.ImageData) -> None:
    before = torch.get_rng_state()
    pace = measure(task(images, batch_size=16), torch.device("cpu"))
    assert min(pace.step, pace.half_step, pace.image) > 0  # how much says a quiet machine alone
    assert torch.equal(before, torch.get_rng_state())


def deadline(images: normlab.ImageData, seconds: float, pace: float) -> State:
    """A training of 50 steps that takes `pace` seconds each, up to where it stops."""
    asked = task(images, batch_size=36, epochs=5)
    plan = replace(make_plan(asked, images, 1), seconds=seconds)
    state = new_state(asked, images, torch.device("cpu"))
    (hook,) = [hook for hook in make_hooks(plan) if isinstance(hook, Deadline)]
    hook.before_training(plan, state)
    while state.step < plan.steps and not state.stopped:
        state.step += 1
        state.seconds += pace
        hook.after_step(state, StepResult(0, 1, 10, 0.0, 0, 1))
    return state


def test_a_training_that_is_slower_than_planned_cools_down_in_time(
    images: normlab.ImageData,
) -> None:
    slow = deadline(images, seconds=10.0, pace=0.4)  # 25 of the 50 steps fit
    assert slow.seconds == pytest.approx(10.0, abs=0.9)
    assert slow.ending is not None
    first, last = slow.ending
    assert last - first >= 0.1 * last
    assert slow.share(1.0) < 0.5
    right = deadline(images, seconds=10.0, pace=0.2)
    assert (right.step, right.ending) == (50, None)


@pytest.mark.soak
def test_minutes_are_kept_by_a_real_training(in_tmp: Path) -> None:
    data = noise()
    run = normlab.train(data=data, threads=1, minutes=0.25)
    assert run.result is not None
    recipe = run.task.recipe
    assert (recipe.name, recipe.patience) == ("pictures", None)
    epochs, steps = recipe.length(batches=1)
    assert epochs * steps >= run.result["steps"] >= 1  # fewer where the machine was slower
    assert run.result["train_seconds"] < 1.1 * 15
    with pytest.raises(UserError, match="minutes=0"):
        normlab.train(data=data, minutes=0)


def test_own_data_are_trained_by_the_recipe_for_them(in_tmp: Path) -> None:
    data = noise()
    told: list[str] = []

    class Listen:
        def before_training(self, plan: Any) -> None:
            told.append(plan.describe())

        def after_step(self, *_: Any) -> None: ...

    run = normlab.train(data=data, threads=1, epochs=2, observers=(Listen(),))
    assert run.path.name == "0001-pictures"
    assert not run.task.recipe.augmentation.flip  # its classes are called 0, 1 and 2
    assert run.result is not None
    assert run.result["length"] == {"epochs": 2, "planned": 2, "held_out": 6, "best_epoch": 1} or (
        run.result["length"]["best_epoch"] == 2
    )
    (text,) = told
    assert "3 classes: 0 20 + 3" in text
    assert "10 % of the training images are held out" in text
    assert "Plan: 32 × 32 pixels, network fast, each picture seen 2 times, never mirrored" in text
    assert "; about " in text


def test_a_cool_down_ends_without_the_hook_that_began_it(images: normlab.ImageData) -> None:
    """As in a run that is resumed: what its minutes were, nothing says any more."""
    asked = task(images, batch_size=36, epochs=5)
    plan = make_plan(asked, images, 1)
    state = new_state(asked, images, torch.device("cpu"))
    state.ending = 0, 3
    fit(plan, state, torch.device("cpu"), hooks=[])
    assert (state.step, state.stopped) == (3, True)


@pytest.mark.parametrize("length", ["epochs", "least_steps"])
def test_minutes_and_another_length_are_refused(in_tmp: Path, length: str) -> None:
    with pytest.raises(UserError, match=rf"minutes=0\.25 .* {length}=3: leave one of them out"):
        normlab.train(data=noise(), threads=1, minutes=0.25, settings={length: 3})
    assert not (in_tmp / "runs").exists()


@pytest.mark.soak
def test_time_that_is_up_in_the_first_epoch_leaves_a_whole_run(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = noise()
    monkeypatch.setattr(training, "steps_in", lambda *_: 1_000_000)
    run = normlab.train(data=data, threads=1, minutes=0.15)
    assert run.result is not None
    assert run.history == []
    held_out = make_plan(run.task, run.task.load(data), 1).validation  # of the weights as they are
    found = score(run.model("last"), held_out.images, held_out.labels)
    assert run.result["val_accuracy"] == found.accuracy
    assert 0 < run.result["steps"] < 33_334
    assert (run.path / "report.html").exists()


def test_three_way_scores_are_had_of_own_data_without_a_recipe(in_tmp: Path) -> None:
    data = noise()
    run = normlab.train(data=data, threads=1, epochs=1, three_way=True)
    assert "val_loss_population" in run.history[0]
