"""What happens around the steps, each thing a hook, in the one order that `make_hooks` declares."""

import math
import time
from collections.abc import Sequence
from typing import Any

from normlab.errors import NonFiniteError, UserError
from normlab.evaluation.population import evenly
from normlab.evaluation.scores import score, three_way
from normlab.recipes.schedules import Schedule
from normlab.training.averaging import averaged, update, use_average
from normlab.training.state import Hook, Plan, State, StepResult, Totals

FEW_HELD_OUT = 10  # validation images; fewer do not end a training
FEW_EPOCHS, PARTS = 4, 20  # in a training of so few epochs, so many parts of each are noted


def make_hooks(plan: Plan, extra: Sequence[Hook] = ()) -> list[Hook]:
    """The hooks that a plan asks for, in order: averages, the epoch's row, what is added to the
    row, the clock, what depends on a whole row.

    Args:
        extra: hooks that add to an epoch's row, such as `ThreeWayScores`.
    """
    recipe = plan.recipe
    hooks: list[Hook] = []
    if recipe.averaging.decay:
        hooks.append(Average(recipe.averaging.decay))
    if recipe.head == "fitted":
        hooks.append(Beginning())
    if plan.epochs <= FEW_EPOCHS:
        hooks.append(EpochParts())
    hooks.append(EpochRow())
    if len(plan.validation):
        hooks.append(Validation())
    hooks += [*extra, Clock()]
    if plan.seconds is not None:
        hooks.append(Deadline(plan.seconds))
    if recipe.patience is not None and len(plan.validation) >= FEW_HELD_OUT:
        hooks.append(Patience(recipe.patience))
    return hooks


class Average(Hook):
    """Moves the average after each step, and leaves it in the model at the end."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def before_training(self, plan: Plan, state: State) -> None:
        self.images, self.ranks = plan.train.images, plan.ranks

    def after_step(self, state: State, done: StepResult) -> None:
        update(state.average, state.model, self.decay, state.step)

    def after_training(self, state: State) -> None:
        use_average(state.model, state.average, self.images, self.ranks)


class Beginning(Hook):
    """Scores a fitted head as epoch 0, which what is learnt from there on has to beat."""

    def before_training(self, plan: Plan, state: State) -> None:
        if state.step or state.history:  # resumed
            return
        started, held_out = time.perf_counter(), plan.validation
        row: dict[str, Any] = {"epoch": 0, "steps": 0, "loss": None, "accuracy": None}
        row |= {"val_loss": None, "val_accuracy": None}
        if len(held_out):
            found = score(state.model, held_out.images, held_out.labels, ranks=plan.ranks)
            row |= {"val_loss": found.loss, "val_accuracy": found.accuracy}
            state.best_val_loss, state.best_epoch = found.loss, 0
            state.best_weights = {k: v.clone() for k, v in state.model.state_dict().items()}
        state.seconds += time.perf_counter() - started
        state.history.append({**row, "seconds": state.seconds})


class EpochParts(Hook):
    """Notes loss and accuracy of each twentieth of an epoch."""

    def after_step(self, state: State, done: StepResult) -> None:
        state.part.add(done.loss, done.correct, done.images)
        if done.batch * PARTS // done.batches > (done.batch - 1) * PARTS // done.batches:
            share = done.batch / done.batches
            state.parts.append([share, state.part.mean_loss, state.part.accuracy])
            state.part = Totals()


class EpochRow(Hook):
    """Sums losses and right answers, and turns them into the epoch's row in the history."""

    def after_step(self, state: State, done: StepResult) -> None:
        state.totals.add(done.loss, done.correct, done.images)
        if not done.ends_epoch:
            return
        row: dict[str, Any] = {
            "epoch": done.epoch + 1,
            "steps": state.step,
            "loss": state.totals.mean_loss,
            "accuracy": state.totals.accuracy,
            "val_loss": None,
            "val_accuracy": None,
        }
        if state.parts:
            row["parts"] = state.parts
        state.history.append(row)
        state.totals, state.part, state.parts = Totals(), Totals(), []


class Validation(Hook):
    """Scores the weights that would be kept, and remembers the best of them.

    Raises:
        NonFiniteError: the validation loss is NaN or infinite.
    """

    def before_training(self, plan: Plan, state: State) -> None:
        self.plan = plan

    def after_step(self, state: State, done: StepResult) -> None:
        if not done.ends_epoch:
            return
        ranks = self.plan.ranks
        with averaged(state.model, state.average, self.plan.train.images, ranks):
            held_out = self.plan.validation
            found = score(state.model, held_out.images, held_out.labels, ranks=ranks)
            if not math.isfinite(found.loss):
                raise NonFiniteError(
                    f"the validation loss is {found.loss} after epoch {done.epoch + 1}: training "
                    "stopped there; try a lower --learning-rate than "
                    f"{self.plan.recipe.optimizer.learning_rate:g}"
                )
            state.history[-1] |= {"val_loss": found.loss, "val_accuracy": found.accuracy}
            if found.loss < state.best_val_loss:
                state.best_val_loss, state.best_epoch = found.loss, done.epoch + 1
                state.best_weights = {k: v.clone() for k, v in state.model.state_dict().items()}


class ThreeWayScores(Hook):
    """Adds to each epoch what the validation images score with the other kinds of statistics.

    `val_loss` and `val_accuracy` are the running statistics' already. Population statistics come
    from at most 4,096 of the training images.

    Raises:
        UserError: no validation images.
    """

    def before_training(self, plan: Plan, state: State) -> None:
        if not len(plan.validation):
            raise UserError("--three-way needs validation images: use --validation above 0")
        self.plan = plan
        self.population = evenly(plan.train.images)

    def after_step(self, state: State, done: StepResult) -> None:
        if not done.ends_epoch:
            return
        ranks = self.plan.ranks
        with averaged(state.model, state.average, self.plan.train.images, ranks):
            scores = three_way(
                state.model,
                self.plan.validation.images,
                self.plan.validation.labels,
                population=self.population,
                batch_size=self.plan.recipe.batch_size,
                ranks=ranks,
            )
        state.history[-1] |= {
            "val_loss_batch": scores.batch.loss,
            "val_accuracy_batch": scores.batch.accuracy,
            "val_loss_population": scores.population.loss,
            "val_accuracy_population": scores.population.accuracy,
        }


class Clock(Hook):
    """Tells the seconds of the training, validation included, also of a resumed one."""

    def before_training(self, plan: Plan, state: State) -> None:
        self.started = time.perf_counter() - state.seconds

    def after_step(self, state: State, done: StepResult) -> None:
        state.seconds = time.perf_counter() - self.started
        if done.ends_epoch:
            state.history[-1]["seconds"] = state.seconds


class Patience(Hook):
    """Ends a training early: so many epochs without a lower validation loss begin a cool-down.

    A network that is stopped at a high learning rate is worth little. So the rate first falls to 0,
    over a fifth of the steps done so far, less where the rate is low already, and one epoch at
    least. Where the schedule lets the rate fall, no epoch counts before it is down to half: at a
    high rate the loss may stand still for long and fall with the rate.
    """

    COOL_DOWN = 0.2

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def before_training(self, plan: Plan, state: State) -> None:
        self.steps, self.epoch, self.schedule = plan.steps, plan.epoch_steps, plan.recipe.schedule
        self.first = first_low(self.schedule, plan.steps) // plan.epoch_steps

    def after_step(self, state: State, done: StepResult) -> None:
        if state.ending is None and done.ends_epoch and self._is_over(state):
            rate = self.schedule.share(state.step / self.steps)
            epochs = max(1, round(self.COOL_DOWN * rate * state.history[-1]["epoch"]))
            end = state.step + epochs * self.epoch
            if end < self.steps:  # else the schedule's own end is as near
                state.ending = state.step, end

    def _is_over(self, state: State) -> bool:
        if state.best_epoch is None:
            return False
        waited: int = state.history[-1]["epoch"] - max(state.best_epoch, self.first)
        return waited >= self.epochs


class Deadline(Hook):
    """Ends a training in time where it turns out slower than it was planned to be.

    When the time that is left is a fifth of that used and will not do, the rate falls to 0 over the
    steps that it still allows.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def before_training(self, plan: Plan, state: State) -> None:
        self.steps, self.pace, self.last = plan.steps, 0.0, state.seconds

    def after_step(self, state: State, done: StepResult) -> None:
        took, self.last = state.seconds - self.last, state.seconds
        self.pace = took if not self.pace else 0.95 * self.pace + 0.05 * took
        left = self.seconds - state.seconds
        late = (self.steps - state.step) * self.pace > 1.05 * left
        if state.ending is None and left <= state.seconds / 5 and late:
            state.ending = state.step, state.step + max(1, int(left / self.pace))


def first_low(schedule: Schedule, steps: int) -> int:
    """The step from which on the rate is half its highest or less; 0 if it does not fall so far."""
    if schedule.share(1.0) > 0.5:
        return 0
    high = (step for step in range(steps, 0, -1) if schedule.share(step / steps) > 0.5)
    return next(high, -1) + 1
