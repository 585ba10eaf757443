"""The training loop: forward, loss, backward, update."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normlab.core.streams import stream
from normlab.core.text import counted
from normlab.data.augment import views_of
from normlab.data.batches import EVALUATION_BATCH, Batches, Split, batch_bounds, to_input
from normlab.errors import NonFiniteError, NormlabError
from normlab.recipes import Recipe
from normlab.training.averaging import adopt, averaged, update
from normlab.training.optimisers import SCHEDULES, Optimizer, set_rate

FEW_EPOCHS, PARTS = 4, 20  # in a training of so few epochs, so many parts of each are noted


@dataclass
class Totals:
    """Sums over the images of an epoch so far."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0

    def add(self, loss: float, correct: int, images: int) -> None:
        self.loss += loss * images
        self.correct += correct
        self.images += images

    @property
    def mean_loss(self) -> float:
        return self.loss / self.images

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


@dataclass
class State:
    """Everything that a training remembers from one step to the next.

    Randomness is not part of it: every draw is a function of the seed and of `step`.
    """

    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    seconds: float = 0.0
    totals: Totals = field(default_factory=Totals)
    part: Totals = field(default_factory=Totals)
    parts: list[list[float]] = field(
        default_factory=list
    )  # of the epoch: share done, loss, accuracy
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    best_val_loss: float = float("inf")
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)

    def loop_state(self) -> dict[str, Any]:
        """The part that is not tensors, as JSON."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "totals": asdict(self.totals),
            "part": asdict(self.part),
            "parts": self.parts,
            "history": self.history,
            "best_epoch": self.best_epoch,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is about to happen; told to observers before the first step."""

    recipe: Recipe
    folder: Path | None  # None in a study, whose runs leave no folder
    seed: int
    threads: int
    train: Split
    validation: Split
    start: str = ""  # in words, where the training starts from another run

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each batch of an epoch begins and ends in the order of the images."""
        return batch_bounds(len(self.train), self.recipe.batch_size, join_single=True)

    @property
    def steps(self) -> int:
        return self.recipe.epochs * len(self.bounds)

    def describe(self) -> str:
        """A line; one more for a start from another run, and for a last batch of a single image."""
        text = (
            f"{self.recipe.name}: norm {self.recipe.norm}, seed {self.seed}, "
            f"{len(self.train):,} training and {len(self.validation):,} validation images, "
            f"{counted(self.recipe.epochs, 'epoch')} of {counted(len(self.bounds), 'step')}, "
            f"{counted(self.threads, 'thread')}"
            + (f", into {self.folder}" if self.folder else "")
            + (f"\nStart: {self.start}" if self.start else "")
        )
        if self.bounds[-1][1] - self.bounds[-1][0] > self.recipe.batch_size:
            text += "\nThe last batch, of one image, joins the one before it: one has no variance."
        return text


class Observer(Protocol):
    """What is told of a training while it goes on."""

    def before_training(self, plan: Plan) -> None:
        """The first step is next."""

    def after_step(self, state: State, epoch: int, batch: int, batches: int) -> None:
        """`batch` of `batches` of `epoch` (from 0) is done; after the last one, so is the epoch."""


class Interrupted(NormlabError):
    """A signal asked the training to end; it ended between two steps."""

    def __init__(self, signum: int, remedy: str = "") -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}{remedy}")
        self.signum = signum
        self.exit_code = 128 + signum


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,  # (N, 3, H, W)
    labels: Tensor,  # (N,)
    rng: np.random.Generator,
    label_smoothing: float = 0.0,
) -> tuple[float, int]:
    """One update of the weights; returns the batch's mean loss and how many were right.

    Raises:
        NonFiniteError: the loss is NaN or infinite; the weights are as before the step.
    """
    logits = model(x, rng)
    loss = cross_entropy(logits, labels, label_smoothing=label_smoothing)
    value = loss.item()
    if not np.isfinite(value):
        raise NonFiniteError(f"the loss is {value}")
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value, int((logits.detach().argmax(1) == labels).sum())


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    images: np.ndarray,
    device: torch.device | str = "cpu",
    views: str = "single",
) -> Tensor:
    """Logits (N, K) of images (N, H, W, 3) uint8, in evaluation mode, on the CPU.

    With more `views` of an image than one (see `views_of`), the mean of their logits.
    """
    was_training = model.training
    model.eval()
    parts = []
    for a, b in batch_bounds(len(images), EVALUATION_BATCH, join_single=False):
        seen = [model(x) for x in views_of(to_input(images[a:b], device), views)]
        parts.append(torch.stack(seen).mean(0).cpu())
    model.train(was_training)
    return torch.cat(parts)


def score(model: nn.Module, split: Split, device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on `split`, in evaluation mode."""
    logits = predict_logits(model, split.images, device)
    labels = torch.from_numpy(split.labels)
    loss = cross_entropy(logits.double(), labels).item()
    return loss, (logits.argmax(1) == labels).double().mean().item()


def fit(plan: Plan, state: State, device: torch.device, observers: Sequence[Observer] = ()) -> None:
    """Train from where `state` stands to the recipe's end.

    A recipe with `ema` leaves the averaged weights in the model, with statistics of their own.

    Raises:
        NonFiniteError: naming epoch and step, and what to try.
        Interrupted: SIGINT or SIGTERM came; observers have seen the last step.
    """
    recipe, seed, train, bounds = plan.recipe, plan.seed, plan.train, plan.bounds
    batches = Batches(train, bounds, plan.steps, recipe, seed, device)
    schedule = SCHEDULES[recipe.schedule]
    for observer in observers:
        observer.before_training(plan)
    started = time.perf_counter() - state.seconds
    state.model.train()
    with _signals() as interrupted:
        for step in range(state.step, plan.steps):
            epoch, batch = divmod(step, len(bounds))
            if batch == 0 and _out_of_patience(recipe, state):
                break
            x, labels = batches(step)
            set_rate(state.optimizer, schedule(step / plan.steps))
            try:
                loss, correct = train_step(
                    state.model,
                    state.optimizer,
                    x,
                    labels,
                    stream(seed, "dropout", step),
                    recipe.label_smoothing,
                )
            except NonFiniteError as e:
                raise NonFiniteError(
                    f"{e} at step {batch + 1} of epoch {epoch + 1}: training stopped there; "
                    f"try a lower --learning-rate than {recipe.learning_rate:g}"
                ) from None
            state.totals.add(loss, correct, len(labels))
            if recipe.epochs <= FEW_EPOCHS:
                _note_part(state, loss, correct, len(labels), batch, len(bounds))
            state.step = step + 1
            if recipe.ema:
                update(state.average, state.model, recipe.ema, state.step)
            state.seconds = time.perf_counter() - started
            if batch + 1 == len(bounds):
                _finish_epoch(plan, state, epoch, device)
                state.seconds = time.perf_counter() - started
                state.history[-1]["seconds"] = state.seconds
            for observer in observers:
                observer.after_step(state, epoch, batch + 1, len(bounds))
            if interrupted:
                raise Interrupted(interrupted[0])
    if state.average:
        adopt(state.model, state.average, train.images)


def _note_part(
    state: State, loss: float, correct: int, images: int, batch: int, batches: int
) -> None:
    state.part.add(loss, correct, images)
    if (batch + 1) * PARTS // batches > batch * PARTS // batches:
        done = (batch + 1) / batches
        state.parts.append([done, state.part.mean_loss, state.part.accuracy])
        state.part = Totals()


def _finish_epoch(plan: Plan, state: State, epoch: int, device: torch.device) -> None:
    """Score the validation images, note the epoch, keep the weights if they are the best so far.

    Raises:
        NonFiniteError: the validation loss is NaN or infinite.
    """
    row: dict[str, Any] = {
        "epoch": epoch + 1,
        "steps": state.step,
        "loss": state.totals.mean_loss,
        "accuracy": state.totals.accuracy,
        "val_loss": None,
        "val_accuracy": None,
    }
    if len(plan.validation):
        with averaged(state.model, state.average, plan.train.images):
            row["val_loss"], row["val_accuracy"] = score(state.model, plan.validation, device)
            if not np.isfinite(row["val_loss"]):
                raise NonFiniteError(
                    f"the validation loss is {row['val_loss']} after epoch {epoch + 1}: training "
                    f"stopped there; try a lower --learning-rate than {plan.recipe.learning_rate:g}"
                )
            if row["val_loss"] < state.best_val_loss:
                state.best_val_loss, state.best_epoch = row["val_loss"], epoch + 1
                state.best_weights = {k: v.clone() for k, v in state.model.state_dict().items()}
    if state.parts:
        row["parts"] = state.parts
    state.history.append(row)
    state.totals, state.part, state.parts = Totals(), Totals(), []


def is_finite(model: nn.Module) -> bool:
    """Whether every weight and running statistic is a finite number."""
    return all(t.isfinite().all() for t in model.state_dict().values())


def _out_of_patience(recipe: Recipe, state: State) -> bool:
    if recipe.patience is None or state.best_epoch is None:
        return False
    return len(state.history) - state.best_epoch >= recipe.patience


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one ends at once.

    At once means within a step, where weights and step number may not belong together: so it is no
    `Interrupted`, after which a checkpoint is written. The one before it stays.

    Outside the main thread, where Python allows no handlers, signals are left as they are.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, _: object) -> None:
        if received:
            raise SystemExit(128 + signum)
        received.append(signum)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
