"""How long a training will take, from a few steps of a network that is thrown away."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from normlab.core.streams import stream
from normlab.data import ImageData
from normlab.data.batches import EVALUATION_BATCH, Split
from normlab.data.pictures.sizes import USUAL
from normlab.errors import UserError
from normlab.evaluation.forward import logits_of
from normlab.evaluation.population import SAMPLE
from normlab.models import FastNet
from normlab.recipes import Recipe
from normlab.recipes.record import MOST_EPOCHS
from normlab.runs import Task
from normlab.text import duration
from normlab.training.captured import Captured
from normlab.training.optimisers import make_optimizer, set_rate
from normlab.training.preparation import make_plan
from normlab.training.state import Plan
from normlab.training.step import train_step

FEW = 16  # images that are scored to measure a network of which the output layer alone is fitted
STEPS = 3  # that are measured, after one that is not
AT_THE_END = 4.0  # seconds of drawing and of the logistic regression


@dataclass(frozen=True)
class Pace:
    """Seconds of a step at the images' size, of one at half of it, and of scoring an image."""

    step: float
    half_step: float
    image: float

    def of_step(self, recipe: Recipe) -> float:
        """Seconds of a step in the mean over a training."""
        half = min(1.0, recipe.half_size)
        return half * self.half_step + (1 - half) * self.step

    def seconds(self, plan: Plan) -> float:
        """What the training of a plan takes, its validation included."""
        checks = plan.epochs * len(plan.validation)
        return plan.steps * self.of_step(plan.recipe) + checks * self.image

    def steps_in(self, seconds: float, plan: Plan) -> int:
        """How many steps fit into the time, beside thirty validations; 0 if none does."""
        left = seconds - MOST_EPOCHS * len(plan.validation) * self.image
        return max(0, int(left / self.of_step(plan.recipe)))

    def ending(self, plan: Plan, images: ImageData) -> float:
        """What stands around a training: the features that a head is fitted to, statistics and
        scores, simple answers, the report.
        """
        count = len(images.y_test) + min(len(plan.train), SAMPLE) + 3 * len(plan.validation)
        if plan.recipe.head == "fitted":
            count += len(plan.train)
        return count * self.image + AT_THE_END


def largest_in(
    seconds: float,
    sizes: Sequence[int],
    task_at: Callable[[int], Task],
    images: ImageData,
    device: torch.device,
) -> tuple[int, Pace]:
    """The largest size of pictures at which the recipe's own length fits into the time, and the
    pace there; the smallest size where none does.

    Above the usual size twice that length has to fit: deeper networks take longer to learn.
    """
    for size in sorted(sizes, reverse=True):
        task = task_at(size)
        pace, plan = measure(task, device), make_plan(task, images, 1)
        lengths = 2 if size > USUAL else 1
        if lengths * pace.seconds(plan) + pace.ending(plan, images) <= seconds:
            break
    return size, pace


def steps_in(seconds: float, pace: Pace, task: Task, images: ImageData) -> int:
    """How many steps fill the time, whole passes over the images where that costs little of it.

    None behind a fitted head, if one look at each image does not fit.

    Raises:
        UserError: not even one look at each image fits.
    """
    plan = make_plan(task, images, 1)
    batches, rest = len(plan.bounds), pace.ending(plan, images)
    steps = pace.steps_in(seconds - rest, plan)
    if steps < batches and task.recipe.head == "fitted":
        return 0
    if steps < batches:
        lacking = pace.of_step(task.recipe) * (batches - steps)
        lacking += MOST_EPOCHS * len(plan.validation) * pace.image + max(0.0, rest - seconds)
        raise UserError(
            f"one look at each of {len(plan.train):,} images, and the scores, take about "
            f"{duration(lacking)} longer than that: give more --minutes, or a smaller --image-size"
        )
    whole = steps // batches * batches
    return whole if whole >= 0.97 * steps else steps


def measure(task: Task, device: torch.device) -> Pace:
    """Take a few steps of the task's network on noise of the images' size, and score some; no step
    where the output layer alone is fitted.

    The fastest of them counts: others on the machine only make steps slower.
    """
    recipe, size = task.recipe, task.image_size
    rng = stream(0, "pace")
    noise = rng.integers(0, 256, (recipe.batch_size, size, size, 3), np.uint8)
    labels = rng.integers(0, len(task.class_names), recipe.batch_size)
    images = Split(noise, labels)
    with torch.random.fork_rng(devices=[]):
        model = task.build()
    if isinstance(model, FastNet):
        model.fit_to(noise)
    model = model.to(device)
    optimizer = make_optimizer(recipe.optimizer, model)
    set_rate(optimizer, 0.0)  # noise at a high rate would end in NaN

    def step(half: bool) -> Callable[[], object]:
        plan = Plan(
            recipe=replace(recipe, half_size=float(half)),
            folder=None,
            seed=0,
            threads=1,
            train=images,
            validation=images,
        )
        batches, calls = plan.batches(device), Captured(model)
        return lambda: train_step(calls, optimizer, *batches(0), rng, recipe.label_smoothing)

    if recipe.learns_nothing:
        full, few = 0.0, noise[:FEW]
    else:
        full, few = _fastest(step(False)), noise[:EVALUATION_BATCH]
    half = _fastest(step(True)) if recipe.half_size and full else full
    return Pace(full, half, _fastest(lambda: logits_of(model, few)) / len(few))


def _fastest(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
