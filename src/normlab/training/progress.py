"""What a person sees while a training goes on."""

import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from normlab.text import printable_lines
from normlab.training.state import Plan, State


def epoch_line(row: dict[str, Any], batches: int, seconds: float) -> str:
    """Tell an epoch in the notebook's own form.

    >>> row = {"loss": 1.38246, "accuracy": 0.52581, "val_loss": None, "val_accuracy": None}
    >>> epoch_line(row, 1407, 39.2)
    '1407/1407 - 39s - loss: 1.3825 - accuracy: 0.5258'
    """
    keys = ("loss", "accuracy", "val_loss", "val_accuracy")
    scores = [f"{key}: {row[key]:.4f}" for key in keys if row[key] is not None]
    return " - ".join([f"{batches}/{batches}", f"{seconds:.0f}s", *scores])


MOST_EPOCHS = 100  # that are told one by one; of more, as many evenly spread and the last


class Lines:
    """Lines for logs and pipes: each epoch's, or of very many epochs those of a hundred."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self.epochs = 0
        self.seconds: float | None = None  # at the end of the epoch that was told last

    def before_training(self, plan: Plan) -> None:
        self.epochs, self.seconds = plan.epochs, None
        self._print(plan.describe())

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if self.seconds is None:  # a resumed training has epochs behind it
            done = state.history[: -1 if batch == batches else None]
            self.seconds = done[-1]["seconds"] if done else 0.0
        every = -(-self.epochs // MOST_EPOCHS)
        if batch < batches or ((epoch + 1) % every and epoch + 1 < self.epochs):
            return
        self._print(f"Epoch {epoch + 1}/{self.epochs}")
        self._print(epoch_line(state.history[-1], batches, state.seconds - self.seconds))
        self.seconds = state.seconds

    def _print(self, text: str) -> None:
        print(printable_lines(text), file=self.file or sys.stdout, flush=True)


class Bar:
    """A live bar with images a second, losses and remaining time; a line for each epoch done."""

    def __init__(self, console: Console) -> None:
        self.lines = Lines()
        self.console = console
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            redirect_stdout=True,
            refresh_per_second=5,
        )
        self.task = self.progress.add_task("", total=None, epoch="", note="")
        self.started: tuple[float, int] | None = None

    def __enter__(self) -> "Bar":
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)

    def before_training(self, plan: Plan) -> None:
        self.plan = plan
        self.lines.before_training(plan)
        self.progress.update(self.task, total=plan.steps)

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        if self.started is None:
            self.started = (time.perf_counter(), state.step)
        seconds, steps = time.perf_counter() - self.started[0], state.step - self.started[1]
        notes = []
        if seconds > 0 and steps:
            notes.append(f"{steps * self.plan.recipe.batch_size / seconds:,.0f} images/s")
        if state.totals.images and self.console.width >= 60:
            notes.append(f"loss {state.totals.mean_loss:.3f}")
        if state.history and state.history[-1]["val_loss"] is not None and self.console.width >= 80:
            notes.append(f"val_loss {state.history[-1]['val_loss']:.3f}")
        self.progress.update(
            self.task,
            completed=state.step,
            epoch=f"{epoch + 1}/{self.plan.epochs}",
            note=" · ".join(notes) if self.console.width >= 40 else "",
        )
        self.lines.after_step(state, epoch, batch, batches)
